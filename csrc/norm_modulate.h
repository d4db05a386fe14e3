// From tensors to the kernels of csrc/cpu/norm_modulate.h, with a gated residual before the norm or without.
#pragma once

#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/norm_modulate.h"
#include "modulation.h"

namespace vqkernels {

struct NormArguments {
  Tensor x;
  OptionalTensor branch;
  OptionalTensor gate;
  OptionalTensor shift[2];
  OptionalTensor scale[2];
  OptionalTensor weight;
  OptionalTensor bias;
  std::string norm;
  double eps;
  bool two;

  // Of x + gate * branch.
  ScalarType residual_type() const {
    ScalarType type = x.scalar_type();
    if (branch) type = promoted(type, branch->scalar_type());
    return gate ? promoted(type, gate->scalar_type()) : type;
  }

  cpu::NormModulateProblem problem(ScalarType arithmetic, std::vector<Tensor>& kept) const {
    STD_TORCH_CHECK(norm == "layer" || norm == "rms", "vqkernels: unknown norm ", norm);
    STD_TORCH_CHECK(branch || !gate, "vqkernels: expected no gate without a branch");
    const Sizes sizes = sizes_of(x);
    cpu::NormModulateProblem p{};
    p.x = rows_view(x, "x", x, false, kept);
    p.branch = rows_view(branch, "branch", x, false, kept);
    p.gate = rows_view(gate, "gate", x, true, kept);
    for (int i = 0; i < 2; ++i) {
      p.shift[i] = rows_view(shift[i], "shift", x, true, kept);
      p.scale[i] = rows_view(scale[i], "scale", x, true, kept);
    }
    p.weight = parameter(weight, "weight", x, arithmetic, kept);
    p.bias = parameter(bias, "bias", x, arithmetic, kept);
    p.batch = sizes.batch;
    p.length = sizes.length;
    p.dim = sizes.dim;
    p.modulations = two ? 2 : 1;
    p.rms = norm == "rms";
    p.wide = arithmetic == ScalarType::Double;
    p.eps = eps;
    return p;
  }
};

struct NormOutputs {
  Tensor residual;
  Tensor y;
  Tensor y2;
  Tensor mean;
  Tensor rstd;
};

inline NormOutputs norm_modulate_forward(const NormArguments& in) {
  const cpu::KeepSubnormals mode;
  const Tensor& x = in.x;
  const Sizes sizes = sizes_of(x);
  const ScalarType residual_type = in.residual_type();
  ScalarType type = residual_type;
  for (const OptionalTensor* t : {&in.shift[0], &in.shift[1], &in.scale[0], &in.scale[1]}) {
    if (*t) type = promoted(type, (*t)->scalar_type());
  }
  const ScalarType arithmetic = type == ScalarType::Double ? type : ScalarType::Float;
  std::vector<Tensor> kept;
  const cpu::NormModulateProblem p = in.problem(arithmetic, kept);
  NormOutputs out{in.branch ? empty(x, {sizes.batch, sizes.length, sizes.dim}, residual_type) : x,
                  empty(x, {sizes.batch, sizes.length, sizes.dim}, type),
                  in.two ? empty(x, {sizes.batch, sizes.length, sizes.dim}, type) : empty(x, {0}, type),
                  p.rms ? empty(x, {0}, arithmetic) : empty(x, {sizes.batch, sizes.length}, arithmetic),
                  empty(x, {sizes.batch, sizes.length}, arithmetic)};
  cpu::NormModulateResult result{};
  if (in.branch) result.residual = rows_out(out.residual);
  result.y[0] = rows_out(out.y);
  if (in.two) result.y[1] = rows_out(out.y2);
  result.mean = p.rms ? nullptr : out.mean.mutable_data_ptr();
  result.rstd = out.rstd.mutable_data_ptr();
  cpu::norm_modulate(p, result, torch_threads());
  return out;
}

struct NormGradients {
  Tensor grad_x;
  Tensor grad_branch;
  std::array<Tensor, cpu::kSums> sums;  // in the order of cpu::Sum
};

// layouts: of gate, shift, scale and those of the second modulation.
inline NormGradients norm_modulate_backward(const NormArguments& in, const OptionalTensor& grad_residual,
                                            const Tensor& grad_y, const OptionalTensor& grad_y2, const Tensor& mean,
                                            const Tensor& rstd, const std::vector<int64_t>& layouts, bool affine) {
  const cpu::KeepSubnormals mode;
  const Tensor& x = in.x;
  const Sizes sizes = sizes_of(x);
  STD_TORCH_CHECK(in.branch.has_value() == in.gate.has_value(), "vqkernels: expected branch and gate, or neither");
  const ScalarType arithmetic =
      promoted(in.residual_type(), grad_y.scalar_type()) == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  std::vector<Tensor> kept;
  cpu::NormModulateProblem p = in.problem(arithmetic, kept);
  for (const Tensor* t : {&mean, &rstd}) {
    if (t == &mean && p.rms) continue;
    check_shape(*t, "mean or rstd", {sizes.batch, sizes.length});
    check_type(*t, "mean or rstd", arithmetic);
    check_same_device(*t, "mean or rstd", x);
    kept.push_back(torch::stable::contiguous(*t));
  }
  cpu::NormModulateGradient g{};
  g.rstd = kept.back().const_data_ptr();
  g.mean = p.rms ? nullptr : kept[kept.size() - 2].const_data_ptr();
  g.grad_residual = rows_view(grad_residual, "grad_residual", x, false, kept);
  g.grad_y[0] = rows_view(grad_y, "grad_y", x, false, kept);
  g.grad_y[1] = rows_view(grad_y2, "grad_y2", x, false, kept);
  check_width({&p.x, &p.branch, &p.gate, &p.scale[0], &p.scale[1], &g.grad_residual, &g.grad_y[0], &g.grad_y[1]},
              p.wide);

  NormGradients out{empty(x, {sizes.batch, sizes.length, sizes.dim}, x.scalar_type()),
                    in.branch ? empty(x, {sizes.batch, sizes.length, sizes.dim}, in.branch->scalar_type())
                              : empty(x, {0}, x.scalar_type()),
                    {x, x, x, x, x, x, x}};
  g.grad_x = rows_out(out.grad_x);
  if (in.branch) g.grad_branch = rows_out(out.grad_branch);
  const ScalarType gate_type = in.gate ? in.gate->scalar_type() : x.scalar_type();
  for (int i = 0; i < cpu::kWeight; ++i) {
    const ScalarType type = i == cpu::kGate ? gate_type : grad_y.scalar_type();
    g.sums[i] = gradient_out(x, layouts[i], type, out.sums[i]);
  }
  for (const int i : {cpu::kWeight, cpu::kBias}) {
    const OptionalTensor& t = i == cpu::kWeight ? in.weight : in.bias;
    const ScalarType type = t ? t->scalar_type() : x.scalar_type();
    out.sums[i] = empty(x, {t && affine ? sizes.dim : 0}, p.wide || type != ScalarType::Double ? type : arithmetic);
    if (t && affine) {
      g.sums[i] = {out.sums[i].mutable_data_ptr(), dtype_of(out.sums[i], "gradient"), cpu::Layout::of_all};
    }
  }
  merge_items(p.batch, p.length,
              {&p.x, &p.branch, &p.gate, &p.scale[0], &p.scale[1], &g.grad_residual, &g.grad_y[0], &g.grad_y[1]},
              g.sums);
  cpu::norm_modulate_backward(p, g, torch_threads());
  // Parameters may be wider than the arithmetic, sums are not.
  for (const int i : {cpu::kWeight, cpu::kBias}) {
    const OptionalTensor& t = i == cpu::kWeight ? in.weight : in.bias;
    if (t) out.sums[i] = torch::stable::to(out.sums[i], t->scalar_type());
  }
  return out;
}

}  // namespace vqkernels
