// Runs every CPU kernel of every instruction set on many tiny problems under the sanitizers: inputs end where their
// allocation ends, outputs are poisoned and end in sentinels, and each level must give what the scalar level gives.
// Its argument is the number of problems. Prints how many ran to their end; exits with 1 and a line about the first
// difference.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "capability.h"
#include "code_statistics.h"
#include "ema_update.h"
#include "nearest_code.h"
#include "residual_quantize.h"
#include "topk_codes.h"
#include "vector_quantize.h"

using namespace vqkernels;
using namespace vqkernels::cpu;

namespace {

std::mt19937_64 generator(1);

int problems_done = 0;

int64_t pick(std::initializer_list<int64_t> values) { return values.begin()[generator() % values.size()]; }

double uniform() { return std::uniform_real_distribution<double>(-2, 2)(generator); }

// Exactly `size` elements on the heap, so that one more is an error.
template <class T>
std::vector<T> random_values(int64_t size) {
  std::vector<T> x(size);
  for (T& value : x) {
    value = static_cast<T>(generator() % 4 == 0 ? static_cast<int>(uniform()) : uniform());
    if (generator() % 200 == 0) value = static_cast<T>(NAN);
    if (generator() % 300 == 0) value = static_cast<T>(1e38);
  }
  return x;
}

int64_t bytes_of(DType type) { return type == DType::float64 ? 8 : type == DType::float32 ? 4 : 2; }

template <class T>
std::vector<char> as_bytes(const std::vector<T>& x) {
  const char* first = reinterpret_cast<const char*>(x.data());
  return std::vector<char>(first, first + x.size() * sizeof(T));
}

std::vector<char> random_tensor(DType type, int64_t size) {
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

[[noreturn]] void fail(const std::string& what) {
  std::printf("%s\n", what.c_str());
  std::exit(1);
}

Parallel threads(int64_t count) {
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
Outputs compare(const std::string& name, const std::vector<int64_t>& sizes,
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

void check_problem(DType z_type, DType codebook_type) {
  const Metric metric = static_cast<Metric>(generator() % 3);
  const int64_t heads = pick({1, 1, 2, 3});
  const int64_t rows = pick({0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 70});
  const int64_t codes = pick({1, 2, 3, 5, 6, 7, 11, 12, 13, 31, 33, 63, 64, 65});
  const int64_t dim = pick({1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 31, 33, 64, 65});
  const std::vector<char> z = random_tensor(z_type, heads * rows * dim);
  const std::vector<char> codebook = random_tensor(codebook_type, heads * codes * dim);
  std::vector<char> mask(heads * rows);
  for (char& value : mask) value = generator() % 4 != 0;
  const bool* mask_data = generator() % 2 ? reinterpret_cast<const bool*>(mask.data()) : nullptr;
  const NearestCodeProblem p{z.data(), codebook.data(), mask_data, z_type, codebook_type,
                             metric,   heads,           rows,      codes,  dim};
  const int64_t wide = z_type == DType::float64 ? 8 : 4;
  const int64_t n = heads * rows;
  const std::string name = "types " + std::to_string(int(z_type)) + " " + std::to_string(int(codebook_type)) +
                           " metric " + std::to_string(int(metric)) + " heads " + std::to_string(heads) + " rows " +
                           std::to_string(rows) + " codes " + std::to_string(codes) + " dim " + std::to_string(dim);

  Outputs found = compare("nearest_code " + name, {n * wide, n * 8}, [&](Outputs& out, const Parallel& parallel) {
    nearest_code(p, out[0].get(), static_cast<int64_t*>(out[1].get()), parallel);
  });
  std::vector<int64_t> indices(n);
  if (n > 0) std::memcpy(indices.data(), found[1].get(), n * 8);
  for (const int64_t index : indices) {
    if (index < -1 || index >= codes) fail("nearest_code " + name + ": index out of range");
  }
  compare("vector_quantize " + name, {n * dim * bytes_of(z_type), n * 8, 8, 8},
          [&](Outputs& out, const Parallel& parallel) {
            const QuantizeResult result =
                vector_quantize(p, out[0].get(), static_cast<int64_t*>(out[1].get()), parallel);
            std::memcpy(out[2].get(), &result.mse, 8);
            std::memcpy(out[3].get(), &result.valid_rows, 8);
          });
  const std::vector<char> grad = random_tensor(z_type, n * dim);
  for (const Estimator estimator : {Estimator::straight_through, Estimator::rotation, Estimator::none}) {
    if (z_type != DType::float64 && generator() % 2) continue;
    std::vector<char> calm = grad;  // NaN payloads are nobody's promise
    for (int64_t i = 0; i < n * dim; ++i) {
      float f = 0;
      double d = 0;
      if (z_type == DType::float32) std::memcpy(&f, calm.data() + 4 * i, 4);
      if (z_type == DType::float64) std::memcpy(&d, calm.data() + 8 * i, 8);
      if (f != f || d != d || wide != bytes_of(z_type))
        std::memset(calm.data() + bytes_of(z_type) * i, 0, bytes_of(z_type));
    }
    compare("backward " + name, {n * dim * bytes_of(z_type)}, [&](Outputs& out, const Parallel& parallel) {
      vector_quantize_backward(p, indices.data(), calm.data(), estimator, 0.37, out[0].get(), parallel);
    });
    compare("backward without gradient " + name, {n * dim * bytes_of(z_type)},
            [&](Outputs& out, const Parallel& parallel) {
              vector_quantize_backward(p, indices.data(), nullptr, estimator, 0.37, out[0].get(), parallel);
            });
  }
  const CodeStatisticsProblem statistics{z.data(), indices.data(), z_type, heads, rows, codes, dim};
  compare("code_statistics " + name, {heads * codes * 8, heads * codes * dim * wide},
          [&](Outputs& out, const Parallel& parallel) {
            code_statistics(statistics, static_cast<int64_t*>(out[0].get()), out[1].get(), parallel);
          });
  if (n > 0) {
    std::vector<int64_t> wrong = indices;
    wrong[generator() % n] = generator() % 2 ? codes : -2;
    const CodeStatisticsProblem bad{z.data(), wrong.data(), z_type, heads, rows, codes, dim};
    Output counts(heads * codes * 8), sums(heads * codes * dim * wide);
    bool refused = false;
    try {
      code_statistics(bad, static_cast<int64_t*>(counts.get()), sums.get(), Parallel{});
    } catch (const std::out_of_range&) {
      refused = true;
    }
    if (!refused || !counts.intact() || !sums.intact()) fail("code_statistics " + name + ": took a bad index");
  }
  ++problems_done;
}

void check_residual(DType z_type, DType codebook_type) {
  const Metric metric = static_cast<Metric>(generator() % 3);
  const int64_t heads = pick({1, 1, 2}), rows = pick({0, 1, 5, 8, 9, 63, 64, 65, 130}), levels = pick({1, 2, 3});
  const int64_t dim = pick({1, 3, 7, 8, 9, 16, 17, 33}), k = pick({1, 2, 7, 40});
  std::vector<int64_t> sizes(levels);
  int64_t codes = 0;
  for (int64_t& size : sizes) codes += size = pick({1, 2, 5, 6, 7, 13, 33});
  const std::vector<char> z = random_tensor(z_type, heads * rows * dim);
  const std::vector<char> codebooks = random_tensor(codebook_type, heads * codes * dim);
  std::vector<char> mask(heads * rows);
  for (char& value : mask) value = generator() % 4 != 0;
  std::vector<int64_t> num_levels(heads * rows);
  for (int64_t& value : num_levels) value = pick({-1, 0, 1, 2, 3, 4});
  const bool* mask_data = generator() % 2 ? reinterpret_cast<const bool*>(mask.data()) : nullptr;
  const int64_t n = heads * rows, wide = z_type == DType::float64 ? 8 : 4;
  const std::string name = "types " + std::to_string(int(z_type)) + " " + std::to_string(int(codebook_type)) +
                           " metric " + std::to_string(int(metric)) + " heads " + std::to_string(heads) + " rows " +
                           std::to_string(rows) + " levels " + std::to_string(levels) + " dim " + std::to_string(dim);
  ResidualProblem p{z.data(), codebooks.data(), sizes.data(),  mask_data, generator() % 2 ? num_levels.data() : nullptr,
                    nullptr,  z_type,           codebook_type, metric,    heads,
                    rows,     levels,           codes,         dim};
  const Outputs found = compare(
      "residual_quantize " + name, {n * dim * bytes_of(z_type), n * levels * 8, heads * levels * 8, heads * levels * 8},
      [&](Outputs& out, const Parallel& parallel) {
        residual_quantize(p, out[0].get(), static_cast<int64_t*>(out[1].get()), static_cast<double*>(out[2].get()),
                          static_cast<int64_t*>(out[3].get()), parallel);
      });
  std::vector<int64_t> indices(n * levels);
  if (!indices.empty()) std::memcpy(indices.data(), found[1].memory.data(), indices.size() * 8);
  for (size_t i = 0; i < indices.size(); ++i) {
    if (indices[i] < -1 || indices[i] >= sizes[i % levels]) fail("residual_quantize " + name + ": index out of range");
  }
  const std::vector<double> coefficients(heads * levels, 0.37);
  for (const Estimator estimator : {Estimator::straight_through, Estimator::rotation, Estimator::none}) {
    compare("residual backward " + name, {n * dim * bytes_of(z_type)}, [&](Outputs& out, const Parallel& parallel) {
      // Rows serve as their own gradient where they have codes, and those are numbers.
      residual_quantize_backward(p, indices.data(), z.data(), estimator, coefficients.data(), out[0].get(), parallel);
    });
  }
  compare("residual_statistics " + name, {heads * codes * 8, heads * codes * dim * wide},
          [&](Outputs& out, const Parallel& parallel) {
            residual_statistics(p, indices.data(), static_cast<int64_t*>(out[0].get()), out[1].get(), parallel);
          });
  const NearestCodeProblem search{
      z.data(), codebooks.data(), mask_data, z_type, codebook_type, metric, heads, rows, codes, dim};
  compare("topk_codes " + name, {n * k * wide, n * k * 8}, [&](Outputs& out, const Parallel& parallel) {
    topk_codes(search, k, out[0].get(), static_cast<int64_t*>(out[1].get()), parallel);
  });
  ++problems_done;
}

void check_ema() {
  const int64_t heads = pick({1, 2}), codes = pick({1, 3, 16, 17, 255, 256, 257}), dim = pick({1, 3, 8, 17, 33});
  const int64_t n = heads * codes;
  std::vector<float> codebook(n * dim), size(n), code_sum(n * dim), sums(n * dim);
  std::vector<int64_t> counts(n);
  for (auto* x : {&codebook, &code_sum, &sums}) {
    for (float& value : *x) value = static_cast<float>(uniform());
  }
  for (float& value : size) value = static_cast<float>(generator() % 3 ? uniform() + 2 : 0);
  for (int64_t& value : counts) value = static_cast<int64_t>(generator() % 5);
  const double decay = pick({0, 1, 2}) / 2.0, eps = pick({0, 1}) * 1e-5;
  compare("ema_update", {n * dim * 4, n * 4, n * dim * 4}, [&](Outputs& out, const Parallel& parallel) {
    std::memcpy(out[0].get(), codebook.data(), n * dim * 4);
    std::memcpy(out[1].get(), size.data(), n * 4);
    std::memcpy(out[2].get(), code_sum.data(), n * dim * 4);
    ema_update({static_cast<float*>(out[0].get()), static_cast<float*>(out[1].get()), static_cast<float*>(out[2].get()),
                counts.data(), sums.data(), heads, codes, dim, decay, eps},
               parallel);
  });
  ++problems_done;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) fail("expected the number of problems");
  const size_t problems = std::stoul(argv[1]);
  std::vector<std::function<void()>> kinds;
  for (const DType z : {DType::float32, DType::bfloat16, DType::float16}) {
    for (const DType codebook : {DType::float32, DType::bfloat16, DType::float16}) {
      kinds.push_back([z, codebook] { check_problem(z, codebook); });
      kinds.push_back([z, codebook] { check_residual(z, codebook); });
    }
  }
  kinds.push_back([] { check_problem(DType::float64, DType::float64); });
  kinds.push_back([] { check_residual(DType::float64, DType::float64); });
  kinds.push_back(check_ema);
  for (size_t i = 0; i < problems; ++i) kinds[i % kinds.size()]();
  std::printf("levels:");
  for (const Capability level : supported_capabilities()) std::printf(" %s", cpu::name(level));
  std::printf("\nproblems: %d\n", problems_done);
}
