// The kernels of the norm chain and of feed-forward layers: rows with strides of all kinds, sums over rows.
#include <memory>

#include "bias_gelu.h"
#include "driver.h"
#include "gate_residual.h"
#include "gated_activation.h"
#include "norm_modulate.h"

namespace sanitizers {
namespace {

struct Sizes {
  int64_t batch;
  int64_t length;
  int64_t dim;

  int64_t rows() const { return batch * length; }
  int64_t size() const { return rows() * dim; }
  std::string name() const {
    return " batch " + std::to_string(batch) + " length " + std::to_string(length) + " dim " + std::to_string(dim);
  }
};

Sizes random_sizes() {
  return {pick({0, 1, 2, 3, 5, 40}), pick({0, 1, 2, 3, 16, 17, 33, 70}),
          pick({1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 63, 64, 65, 130, 257})};
}

// The types of the tensors of a problem: one for all or any, none wider than the arithmetic.
class Types {
 public:
  explicit Types(bool wide) : wide_(wide), alike_(chance()), common_(any()) {}
  DType next() const { return alike_ ? common_ : any(); }
  DType arithmetic() const { return wide_ ? DType::float64 : DType::float32; }

 private:
  DType any() const {
    const DType narrow = any_of({DType::float32, DType::bfloat16, DType::float16});
    return wide_ && chance() ? DType::float64 : narrow;
  }

  const bool wide_;
  const bool alike_;
  const DType common_;
};

// Inputs of a problem, which live as long as it does.
class Inputs {
 public:
  // Rows [batch, length, dim], some of them in memory with gaps or with the axes exchanged.
  RowsView rows(const Sizes& s, DType type) {
    switch (generator() % 3) {
      case 0:
        return view(s, type, s.length * s.dim, s.dim);
      case 1:
        return view(s, type, s.length * (s.dim + 3), s.dim + 3);
      default:
        return view(s, type, s.dim, s.batch * s.dim);
    }
  }
  // Rows, or one for each batch item (a part of six side by side) or for all.
  RowsView modulation(const Sizes& s, DType type) {
    switch (generator() % 3) {
      case 0:
        return view(s, type, 0, 0);
      case 1:
        return view(s, type, 6 * s.dim, 0);
      default:
        return rows(s, type);
    }
  }
  const void* vector(DType type, int64_t size) { return keep(calm_tensor(type, size)); }

 private:
  RowsView view(const Sizes& s, DType type, int64_t batch_stride, int64_t row_stride) {
    const int64_t last = (s.batch - 1) * batch_stride + (s.length - 1) * row_stride;
    return {keep(calm_tensor(type, s.rows() == 0 ? 1 : last + s.dim)), type, batch_stride, row_stride};
  }
  const void* keep(std::vector<char> bytes) {
    kept_.push_back(std::make_unique<std::vector<char>>(std::move(bytes)));
    return kept_.back()->data();
  }

  std::vector<std::unique_ptr<std::vector<char>>> kept_;
};

struct Sum {
  DType type;
  Layout layout;

  Expected expected(const Sizes& s) const {
    const int64_t rows[] = {0, 1, s.batch, s.rows()};
    return {type, rows[static_cast<int>(layout)] * s.dim};
  }
  GradientOut out(Output& output) const {
    return layout == Layout::none ? GradientOut{} : GradientOut{output.get(), type, layout};
  }
};

Sum random_sum(const Types& types) {
  return {types.next(), any_of({Layout::none, Layout::of_all, Layout::of_batch, Layout::of_row})};
}

void check_norm_modulate(bool wide) {
  const Sizes s = random_sizes();
  const Types types(wide);
  const DType arithmetic = types.arithmetic();
  Inputs in;
  NormModulateProblem p{};
  p.x = in.rows(s, types.next());
  const bool with_branch = chance(), with_gate = with_branch && chance();
  if (with_branch) p.branch = in.rows(s, types.next());
  if (with_gate) p.gate = in.modulation(s, types.next());
  p.modulations = static_cast<int>(pick({1, 2}));
  for (int i = 0; i < p.modulations; ++i) {
    if (chance()) p.shift[i] = in.modulation(s, types.next());
    if (chance()) p.scale[i] = in.modulation(s, types.next());
  }
  if (chance()) p.weight = in.vector(arithmetic, s.dim);
  if (chance()) p.bias = in.vector(arithmetic, s.dim);
  p.batch = s.batch;
  p.length = s.length;
  p.dim = s.dim;
  p.rms = chance();
  p.wide = wide;
  p.eps = 1e-6;
  const std::string name = "norm_modulate wide " + std::to_string(wide) + " branch " + std::to_string(with_branch) +
                           " rms " + std::to_string(p.rms) + s.name();

  const DType residual_type = types.next(), y_types[] = {types.next(), types.next()};
  Outputs found = compare_calm(name,
                               {{residual_type, with_branch ? s.size() : 0},
                                {y_types[0], s.size()},
                                {y_types[1], p.modulations == 2 ? s.size() : 0},
                                {arithmetic, p.rms ? 0 : s.rows()},
                                {arithmetic, s.rows()}},
                               [&](Outputs& out, const Parallel& parallel) {
                                 NormModulateResult result{};
                                 if (with_branch) result.residual = {out[0].get(), residual_type};
                                 for (int i = 0; i < p.modulations; ++i) result.y[i] = {out[1 + i].get(), y_types[i]};
                                 if (!p.rms) result.mean = out[3].get();
                                 result.rstd = out[4].get();
                                 norm_modulate(p, result, parallel);
                               });

  if (with_branch != with_gate) return;
  std::vector<Sum> sums;
  for (int i = 0; i < kSums; ++i) sums.push_back(random_sum(types));
  for (const int i : {kWeight, kBias}) sums[i].layout = chance() ? Layout::of_all : Layout::none;
  const DType x_type = types.next(), branch_type = types.next();
  NormModulateGradient g{};
  g.grad_y[0] = in.rows(s, types.next());
  if (p.modulations == 2) g.grad_y[1] = in.rows(s, types.next());
  if (chance()) g.grad_residual = in.rows(s, types.next());
  g.mean = p.rms ? nullptr : found[3].get();
  g.rstd = found[4].get();
  std::vector<Expected> expected = {{x_type, s.size()}, {branch_type, with_branch ? s.size() : 0}};
  for (const Sum& sum : sums) expected.push_back(sum.expected(s));
  compare_calm(name + " backward", expected, [&](Outputs& out, const Parallel& parallel) {
    NormModulateGradient gradient = g;
    gradient.grad_x = {out[0].get(), x_type};
    if (with_branch) gradient.grad_branch = {out[1].get(), branch_type};
    for (int i = 0; i < kSums; ++i) gradient.sums[i] = sums[i].out(out[2 + i]);
    norm_modulate_backward(p, gradient, parallel);
  });
}

void check_gate_residual(bool wide) {
  const Sizes s = random_sizes();
  const Types types(wide);
  Inputs in;
  const GateResidualProblem p{in.rows(s, types.next()),
                              in.rows(s, types.next()),
                              in.modulation(s, types.next()),
                              s.batch,
                              s.length,
                              s.dim,
                              wide};
  const std::string name = "gate_residual wide " + std::to_string(wide) + s.name();
  const DType type = types.next();
  compare_calm(name, {{type, s.size()}},
               [&](Outputs& out, const Parallel& parallel) { gate_residual(p, {out[0].get(), type}, parallel); });
  const RowsView grad = in.rows(s, types.next());
  const Sum sum = random_sum(types);
  compare_calm(name + " backward", {{type, s.size()}, sum.expected(s)}, [&](Outputs& out, const Parallel& parallel) {
    gate_residual_backward(p, {grad, {out[0].get(), type}, {sum.out(out[1])}}, parallel);
  });
}

void check_bias_gelu(bool wide) {
  const Sizes s = random_sizes();
  const Types types(wide);
  Inputs in;
  const bool with_bias = chance();
  const BiasGeluProblem p{in.rows(s, types.next()),
                          with_bias ? in.vector(types.arithmetic(), s.dim) : nullptr,
                          any_of({Activation::gelu, Activation::gelu_tanh}),
                          s.batch,
                          s.length,
                          s.dim,
                          wide};
  const std::string name = "bias_gelu wide " + std::to_string(wide) + " bias " + std::to_string(with_bias) + s.name();
  const DType type = types.next();
  compare_calm(name, {{type, s.size()}},
               [&](Outputs& out, const Parallel& parallel) { bias_gelu(p, {out[0].get(), type}, parallel); });
  const RowsView grad = in.rows(s, types.next());
  const Sum sum{types.next(), with_bias && chance() ? Layout::of_all : Layout::none};
  compare_calm(name + " backward", {{type, s.size()}, sum.expected(s)}, [&](Outputs& out, const Parallel& parallel) {
    bias_gelu_backward(p, {grad, {out[0].get(), type}, {sum.out(out[1])}}, parallel);
  });
}

void check_gated_activation(bool wide) {
  const Sizes s = random_sizes(), both{s.batch, s.length, 2 * s.dim};
  const Types types(wide);
  Inputs in;
  const bool with_bias = chance();
  const GatedActivationProblem p{in.rows(both, types.next()),
                                 with_bias ? in.vector(types.arithmetic(), both.dim) : nullptr,
                                 any_of({Activation::silu, Activation::gelu, Activation::gelu_tanh}),
                                 chance(),
                                 s.batch,
                                 s.length,
                                 s.dim,
                                 wide};
  const std::string name =
      "gated_activation wide " + std::to_string(wide) + " bias " + std::to_string(with_bias) + s.name();
  const DType type = types.next();
  compare_calm(name, {{type, s.size()}},
               [&](Outputs& out, const Parallel& parallel) { gated_activation(p, {out[0].get(), type}, parallel); });
  const RowsView grad = in.rows(s, types.next());
  const Sum sum{types.next(), with_bias && chance() ? Layout::of_all : Layout::none};
  compare_calm(name + " backward", {{type, both.size()}, sum.expected(both)},
               [&](Outputs& out, const Parallel& parallel) {
                 gated_activation_backward(p, {grad, {out[0].get(), type}, {sum.out(out[1])}}, parallel);
               });
}

}  // namespace

Kinds norm_chain_kinds() {
  Kinds kinds;
  for (const auto check : {check_norm_modulate, check_gate_residual, check_bias_gelu, check_gated_activation}) {
    for (const bool wide : {false, true}) {
      kinds.push_back([check, wide] {
        check(wide);
        ++problems_done;
      });
    }
  }
  return kinds;
}

}  // namespace sanitizers
