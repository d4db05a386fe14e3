// Runs every CPU kernel of every instruction set on many tiny problems under the sanitizers: each level must give what
// the scalar level gives. Its argument is the number of problems. Prints how many ran to their end; exits with 1 and a
// line about the first difference. Here are the kernels of vector quantization.
#include "driver.h"

#include <stdexcept>

#include "code_statistics.h"
#include "ema_update.h"
#include "nearest_code.h"
#include "residual_quantize.h"
#include "topk_codes.h"
#include "vector_quantize.h"

using namespace sanitizers;

namespace {

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
  Kinds kinds;
  for (const DType z : {DType::float32, DType::bfloat16, DType::float16}) {
    for (const DType codebook : {DType::float32, DType::bfloat16, DType::float16}) {
      kinds.push_back([z, codebook] { check_problem(z, codebook); });
      kinds.push_back([z, codebook] { check_residual(z, codebook); });
    }
  }
  kinds.push_back([] { check_problem(DType::float64, DType::float64); });
  kinds.push_back([] { check_residual(DType::float64, DType::float64); });
  kinds.push_back(check_ema);
  for (const Kinds& more : {norm_chain_kinds(), denoising_kinds()}) kinds.insert(kinds.end(), more.begin(), more.end());
  for (size_t i = 0; i < problems; ++i) kinds[i % kinds.size()]();
  std::printf("levels:");
  for (const Capability level : supported_capabilities()) std::printf(" %s", cpu::name(level));
  std::printf("\nproblems: %d\n", problems_done);
}
