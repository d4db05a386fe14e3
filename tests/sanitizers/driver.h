// What the drivers share: random inputs that end where their allocation ends, poisoned outputs that end in sentinels,
// and the comparison of all instruction sets.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/float16.h"
#include "../../csrc/types.h"
#include "capability.h"
#include "parallel.h"

namespace sanitizers {

using namespace vqkernels;
using namespace vqkernels::cpu;

inline std::mt19937_64 generator(1);

inline int problems_done = 0;

using Kinds = std::vector<std::function<void()>>;  // each runs one problem

Kinds norm_chain_kinds();
Kinds denoising_kinds();

inline int64_t pick(std::initializer_list<int64_t> values) { return values.begin()[generator() % values.size()]; }

inline double uniform() { return std::uniform_real_distribution<double>(-2, 2)(generator); }

// Exactly `size` elements on the heap, so that one more is an error.
template <class T>
inline std::vector<T> random_values(int64_t size) {
  std::vector<T> x(size);
  for (T& value : x) {
    value = static_cast<T>(generator() % 4 == 0 ? static_cast<int>(uniform()) : uniform());
    if (generator() % 200 == 0) value = static_cast<T>(NAN);
    if (generator() % 300 == 0) value = static_cast<T>(1e38);
  }
  return x;
}

inline int64_t bytes_of(DType type) { return type == DType::float64 ? 8 : type == DType::float32 ? 4 : 2; }

template <class T>
inline std::vector<char> as_bytes(const std::vector<T>& x) {
  const char* first = reinterpret_cast<const char*>(x.data());
  return std::vector<char>(first, first + x.size() * sizeof(T));
}

inline std::vector<char> random_tensor(DType type, int64_t size) {
  if (type == DType::float64) return as_bytes(random_values<double>(size));
  if (type == DType::float32) return as_bytes(random_values<float>(size));
  std::vector<uint16_t> x(size);  // any 16 bits are a number; mostly of moderate size
  for (uint16_t& bits : x) {
    bits = static_cast<uint16_t>(generator());
    if (generator() % 50 != 0) bits = (bits & 0x83ff) | 0x3c00;
  }
  return as_bytes(x);
}

// An output of `size` bytes between poison, and after it a sentinel.
struct Output {
  static constexpr int kSentinel = 64;
  std::vector<unsigned char> memory;
  explicit Output(int64_t size) : memory(size + kSentinel, 0xa5) { std::memset(memory.data(), 0xff, size); }
  void* get() { return memory.data(); }
  bool intact() const {
    for (size_t i = memory.size() - kSentinel; i < memory.size(); ++i) {
      if (memory[i] != 0xa5) return false;
    }
    return true;
  }
};

using Outputs = std::vector<Output>;

[[noreturn]] inline void fail(const std::string& what) {
  std::printf("%s\n", what.c_str());
  std::exit(1);
}

inline Parallel threads(int64_t count) {
  Parallel parallel;
  parallel.threads = count;
  parallel.run = [count](int64_t size, const Body& body) {
    std::vector<std::thread> team;
    for (int64_t t = 0; t < count; ++t) {
      const int64_t begin = size * t / count, end = size * (t + 1) / count;
      if (begin < end) team.emplace_back([&body, begin, end] { body(begin, end); });
    }
    for (std::thread& member : team) member.join();
  };
  return parallel;
}

// Runs `run` into fresh outputs at every level and with 1 and 3 threads; all must equal the first, which is scalar.
inline Outputs compare(const std::string& name, const std::vector<int64_t>& sizes,
                       const std::function<void(Outputs&, const Parallel&)>& run) {
  Outputs first;
  for (const Capability level : supported_capabilities()) {
    setenv("VQKERNELS_CPU_CAPABILITY", cpu::name(level), 1);
    for (const int64_t count : {1, 3}) {
      Outputs outputs;
      for (const int64_t size : sizes) outputs.emplace_back(size);
      run(outputs, threads(count));
      for (const Output& output : outputs) {
        if (!output.intact()) fail(name + ": wrote past the end at level " + cpu::name(level));
      }
      if (first.empty()) {
        first = std::move(outputs);
        continue;
      }
      for (size_t i = 0; i < outputs.size(); ++i) {
        if (outputs[i].memory != first[i].memory) {
          fail(name + ": output " + std::to_string(i) + " differs at level " + cpu::name(level) + ", threads " +
               std::to_string(count));
        }
      }
    }
  }
  return first;
}

inline bool chance() { return generator() % 2 == 0; }

template <class T>
inline T any_of(std::initializer_list<T> values) {
  return values.begin()[generator() % values.size()];
}

// Numbers of moderate size, none of them NaN.
inline std::vector<char> calm_tensor(DType type, int64_t size) {
  std::vector<char> bytes(size * bytes_of(type));
  for (int64_t i = 0; i < size; ++i) {
    const double value = uniform();
    char* out = bytes.data() + i * bytes_of(type);
    const auto write = [&](auto number) { std::memcpy(out, &number, sizeof(number)); };
    BFloat16 b;
    Half h;
    switch (type) {
      case DType::float64:
        write(value);
        break;
      case DType::float32:
        write(static_cast<float>(value));
        break;
      case DType::bfloat16:
        narrow(static_cast<float>(value), &b);
        write(b.bits);
        break;
      case DType::float16:
        narrow(static_cast<float>(value), &h);
        write(h.bits);
        break;
    }
  }
  return bytes;
}

// Of calm inputs every number of an output is one; what nobody has written is the poison, a NaN of every type.
inline void check_written(const std::string& name, void* data, DType type, int64_t size) {
  const char* bytes = static_cast<const char*>(data);
  for (int64_t i = 0; i < size; ++i) {
    uint64_t bits = 0;
    std::memcpy(&bits, bytes + i * bytes_of(type), bytes_of(type));
    const uint64_t exponent = type == DType::float64    ? 0x7ff0000000000000
                              : type == DType::float32  ? 0x7f800000
                              : type == DType::bfloat16 ? 0x7f80
                                                        : 0x7c00;
    if ((bits & exponent) == exponent) fail(name + ": element " + std::to_string(i) + " is not a number");
  }
}

// An output of `size` numbers of a type.
struct Expected {
  DType type;
  int64_t size;
};

// `compare` of a kernel with calm inputs.
inline Outputs compare_calm(const std::string& name, const std::vector<Expected>& expected,
                            const std::function<void(Outputs&, const Parallel&)>& run) {
  std::vector<int64_t> sizes;
  for (const Expected& e : expected) sizes.push_back(e.size * bytes_of(e.type));
  Outputs first = compare(name, sizes, run);
  for (size_t i = 0; i < expected.size(); ++i) {
    check_written(name + ": output " + std::to_string(i), first[i].get(), expected[i].type, expected[i].size);
  }
  return first;
}

}  // namespace sanitizers
