#include "cpu/gate_residual.h"

#include <array>
#include <tuple>
#include <vector>

#include "modulation.h"

namespace vqkernels {
namespace {

cpu::GateResidualProblem gate_residual_problem(const Tensor& branch, const Tensor& gate, const Tensor& x,
                                               ScalarType type, std::vector<Tensor>& kept) {
  const Sizes sizes = sizes_of(branch);
  return {rows_view(x, "x", branch, false, kept),
          rows_view(branch, "branch", branch, false, kept),
          rows_view(gate, "gate", branch, true, kept),
          sizes.batch,
          sizes.length,
          sizes.dim,
          type == ScalarType::Double};
}

Tensor gate_residual_cpu(const Tensor& x, const Tensor& branch, const Tensor& gate) {
  const cpu::KeepSubnormals mode;
  const ScalarType type = promoted(promoted(x.scalar_type(), branch.scalar_type()), gate.scalar_type());
  std::vector<Tensor> kept;
  const cpu::GateResidualProblem p = gate_residual_problem(branch, gate, x, type, kept);
  Tensor residual = empty(x, {p.batch, p.length, p.dim}, type);
  cpu::gate_residual(p, rows_out(residual), torch_threads());
  return residual;
}

std::tuple<Tensor, Tensor> gate_residual_backward_cpu(const Tensor& grad_residual, const Tensor& branch,
                                                      const Tensor& gate, int64_t layout) {
  const cpu::KeepSubnormals mode;
  std::vector<Tensor> kept;
  const ScalarType type = promoted(promoted(grad_residual.scalar_type(), branch.scalar_type()), gate.scalar_type());
  cpu::GateResidualProblem p = gate_residual_problem(branch, gate, grad_residual, type, kept);
  Tensor grad_branch = empty(branch, {p.batch, p.length, p.dim}, branch.scalar_type()), grad_gate = grad_branch;
  cpu::GateResidualGradient g{
      p.x, rows_out(grad_branch), {gradient_out(branch, layout, gate.scalar_type(), grad_gate)}};
  merge_items(p.batch, p.length, {&p.branch, &p.gate, &g.grad_residual}, g.sums);
  cpu::gate_residual_backward(p, g, torch_threads());
  return {grad_branch, grad_gate};
}

}  // namespace
}  // namespace vqkernels

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) {
  m.impl("gate_residual", TORCH_BOX(&vqkernels::gate_residual_cpu));
  m.impl("gate_residual_backward", TORCH_BOX(&vqkernels::gate_residual_backward_cpu));
}
