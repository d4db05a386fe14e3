// What a CPU driver needs of its caller to run on several threads. The binding passes torch's pool.
#pragma once

#include <cstdint>
#include <functional>

namespace vqkernels::cpu {

using Body = std::function<void(int64_t begin, int64_t end)>;

struct Parallel {
  int64_t threads = 1;
  // Calls body on disjoint ranges that cover [0, count), possibly at the same time.
  std::function<void(int64_t count, const Body& body)> run = [](int64_t count, const Body& body) { body(0, count); };
};

}  // namespace vqkernels::cpu
