// The kernels of attention's queries and keys, of group normalisation and of sampling.
#include <algorithm>

#include "driver.h"
#include "group_norm_silu.h"
#include "guided_step.h"
#include "qk_norm_rope.h"

namespace sanitizers {
namespace {

constexpr DType kTypes[] = {DType::float32, DType::float64, DType::bfloat16, DType::float16};

DType arithmetic_type(DType type) { return type == DType::float64 ? DType::float64 : DType::float32; }

std::string type_name(DType type) { return " type " + std::to_string(static_cast<int>(type)); }

struct HeadSizes {
  int64_t batch;
  int64_t length;
  int64_t heads;
  int64_t dim;

  int64_t size() const { return batch * length * heads * dim; }
};

// Rows of [batch, length, heads, dim] in memory: in this order, as a part of packed queries, keys and values, or with
// the heads before the positions. Without gaps where `dense`.
HeadStrides random_strides(const HeadSizes& s, bool dense) {
  const int64_t order = static_cast<int64_t>(generator() % (dense ? 2 : 3));
  if (order == 0) return {s.length * s.heads * s.dim, s.heads * s.dim, s.dim};
  if (order == 1) return {s.heads * s.length * s.dim, s.dim, s.length * s.dim};
  return {3 * s.length * s.heads * s.dim, 3 * s.heads * s.dim, s.dim};
}

std::vector<char> random_heads(const HeadSizes& s, const HeadStrides& strides, DType type) {
  if (s.size() == 0) return {};
  const int64_t last =
      (s.batch - 1) * strides.batch + (s.length - 1) * strides.position + (s.heads - 1) * strides.head + s.dim;
  return calm_tensor(type, last);
}

void check_qk_norm_rope(DType type) {
  const HeadSizes s{pick({0, 1, 2, 3}), pick({0, 1, 2, 17, 35}), pick({1, 2, 3, 16}),
                    pick({1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 40, 64, 72, 130})};
  const DType arithmetic = arithmetic_type(type);
  QkNormRopeProblem p{};
  p.x_strides = random_strides(s, false);
  const std::vector<char> x = random_heads(s, p.x_strides, type);
  p.x = x.data();
  p.type = type;
  p.norm = any_of({HeadNorm::none, HeadNorm::rms, HeadNorm::layer, HeadNorm::l2});
  p.across_heads = chance();
  p.interleaved = chance();
  p.eps = 1e-6;
  p.batch = s.batch;
  p.length = s.length;
  p.heads = s.heads;
  p.dim = s.dim;
  p.weight.heads = pick({0, 1, s.heads});
  p.bias.heads = pick({0, 1, s.heads});
  const std::vector<char> weight = calm_tensor(arithmetic, p.weight.heads * s.dim);
  const std::vector<char> bias = calm_tensor(arithmetic, p.bias.heads * s.dim);
  p.weight.data = weight.data();
  p.bias.data = bias.data();
  p.pairs = std::min(s.dim / 2, pick({0, 1, 4, 8, 20, s.dim / 2}));
  const bool shared_table = chance();
  const int64_t positions = shared_table ? s.length : s.batch * s.length, gap = pick({0, 3});
  p.table_position_stride = p.pairs + gap;
  p.table_batch_stride = shared_table ? 0 : s.length * p.table_position_stride;
  const int64_t table_size = positions == 0 ? 0 : positions * p.table_position_stride - gap;
  const std::vector<char> cos = calm_tensor(arithmetic, table_size), sin = calm_tensor(arithmetic, table_size);
  p.cos = cos.data();
  p.sin = sin.data();
  const std::string name = "qk_norm_rope" + type_name(type) + " norm " + std::to_string(static_cast<int>(p.norm)) +
                           " pairs " + std::to_string(p.pairs) + " heads " + std::to_string(s.heads) + " dim " +
                           std::to_string(s.dim) + " rows " + std::to_string(p.rows());

  const HeadStrides out_strides = random_strides(s, true);
  const auto forward = [&](Outputs& out, const Parallel& parallel) {
    qk_norm_rope(p, out[0].get(), out_strides, parallel);
  };
  compare_calm(name, {{type, s.size()}}, forward);
  if (p.norm == HeadNorm::rms || p.norm == HeadNorm::l2) {
    const int64_t norms = p.rows() * (p.across_heads ? 1 : s.heads);
    const std::vector<char> factor = arithmetic == DType::float64 ? as_bytes(std::vector<double>(norms, 0.7))
                                                                  : as_bytes(std::vector<float>(norms, 0.7F));
    p.factor = factor.data();
    compare_calm(name + " with factor", {{type, s.size()}}, forward);
    p.factor = nullptr;
  }

  const HeadStrides grad_strides = random_strides(s, false), grad_x_strides = random_strides(s, true);
  const std::vector<char> grad = random_heads(s, grad_strides, type);
  compare_calm(name + " backward",
               {{type, s.size()},
                {arithmetic, p.weight.heads * s.dim},
                {arithmetic, p.bias.heads * s.dim},
                {DType::float64, p.chunks() * p.weight.heads * s.dim},
                {DType::float64, p.chunks() * p.bias.heads * s.dim}},
               [&](Outputs& out, const Parallel& parallel) {
                 const QkNormRopeGradients g{grad.data(),
                                             grad_strides,
                                             out[0].get(),
                                             grad_x_strides,
                                             static_cast<double*>(out[3].get()),
                                             static_cast<double*>(out[4].get())};
                 qk_norm_rope_backward(p, g, out[1].get(), out[2].get(), parallel);
               });
}

void check_group_norm_silu(DType type) {
  const DType arithmetic = arithmetic_type(type);
  GroupNormSiluProblem p{};
  p.type = type;
  p.channels_last = chance();
  p.silu = chance();
  p.batch = pick({1, 2, 3});
  p.groups = pick({1, 2, 3, 8});
  p.channels = p.groups * pick({1, 2, 3, 5, 9, 16});
  p.positions = pick({1, 2, 3, 7, 15, 16, 17, 63, 65, 127, 129, 300, 700});
  p.eps = 1e-6;
  const int64_t size = p.batch * p.channels * p.positions, statistics = p.batch * p.groups;
  const std::vector<char> x = calm_tensor(type, size), grad = calm_tensor(type, size);
  const std::vector<char> weight = calm_tensor(arithmetic, p.channels), bias = calm_tensor(arithmetic, p.channels);
  p.x = x.data();
  p.weight = chance() ? weight.data() : nullptr;
  p.bias = chance() ? bias.data() : nullptr;
  const std::string name = "group_norm_silu" + type_name(type) + " channels_last " + std::to_string(p.channels_last) +
                           " batch " + std::to_string(p.batch) + " channels " + std::to_string(p.channels) +
                           " groups " + std::to_string(p.groups) + " positions " + std::to_string(p.positions);
  Outputs found = compare_calm(name, {{type, size}, {arithmetic, statistics}, {arithmetic, statistics}},
                               [&](Outputs& out, const Parallel& parallel) {
                                 group_norm_silu(p, out[0].get(), out[1].get(), out[2].get(), parallel);
                               });
  const bool wants_x = generator() % 4 != 0;
  compare_calm(name + " backward", {{type, wants_x ? size : 0}, {arithmetic, p.channels}, {arithmetic, p.channels}},
               [&](Outputs& out, const Parallel& parallel) {
                 group_norm_silu_backward(p, grad.data(), found[1].get(), found[2].get(),
                                          wants_x ? out[0].get() : nullptr, out[1].get(), out[2].get(), parallel);
               });
}

void check_guided_step(DType type) {
  const DType output_type = type == DType::float64 ? type : any_of({DType::float32, DType::bfloat16, DType::float16});
  GuidedStepProblem p{};
  p.sample_type = type;
  p.output_type = output_type;
  p.rows = pick({0, 1, 2, 3});
  p.size = pick({0, 1, 7, 15, 16, 17, 48, 65, 1030, 2100, 17000});
  p.period = pick({1, 3, 4, 16, 20, 500, 1024, 1100});
  p.guided = pick({0, 1, p.period / 2, p.period});
  const int64_t gap = pick({0, 5});
  std::vector<std::vector<char>> kept;
  const auto rows = [&](bool there, DType of) {
    if (!there) return Rows{};
    kept.push_back(calm_tensor(of, p.rows * p.size == 0 ? 1 : p.rows * (p.size + gap) - gap));
    return Rows{kept.back().data(), p.size + gap};
  };
  const bool with_noise = chance();
  p.sample = rows(true, type);
  p.output = rows(true, output_type);
  p.unconditional = rows(chance(), output_type);
  p.noise = rows(with_noise, type);
  p.variance = rows(with_noise && chance(), output_type);
  p.guidance_scale = 3.5;
  p.clean_sample = 1.25;
  p.clean_output = -0.75;
  p.clip = chance() ? 1 : INFINITY;
  p.step_sample = 0.5;
  p.step_clean = 0.625;
  p.noise_scale = 0.25;
  p.min_log_variance = -3;
  p.max_log_variance = -1;
  const std::string name = "guided_step" + type_name(type) + " size " + std::to_string(p.size) + " period " +
                           std::to_string(p.period) + " guided " + std::to_string(p.guided);
  compare_calm(name, {{type, p.rows * p.size}},
               [&](Outputs& out, const Parallel& parallel) { guided_step(p, out[0].get(), parallel); });
}

}  // namespace

Kinds denoising_kinds() {
  Kinds kinds;
  for (const DType type : kTypes) {
    for (const auto check : {check_qk_norm_rope, check_group_norm_silu, check_guided_step}) {
      kinds.push_back([check, type] {
        check(type);
        ++problems_done;
      });
    }
  }
  return kinds;
}

}  // namespace sanitizers
