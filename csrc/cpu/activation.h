// The activations that the feed-forward kernels know.
#pragma once

namespace vqkernels::cpu {

enum class Activation { silu, gelu, gelu_tanh };

}  // namespace vqkernels::cpu
