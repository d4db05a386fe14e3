// Keeps subnormal numbers while it lives. A caller may have told its thread to flush them to zero
// (torch.set_flush_denormal), and no result may depend on what one thread of several was told.
#pragma once

#include <cstdint>

#ifdef VQKERNELS_X86
#include <xmmintrin.h>
#endif

namespace vqkernels::cpu {

class KeepSubnormals {
 public:
  KeepSubnormals() : before_(get()) { set(before_ & ~kFlush); }
  ~KeepSubnormals() { set(before_); }
  KeepSubnormals(const KeepSubnormals&) = delete;
  KeepSubnormals& operator=(const KeepSubnormals&) = delete;

 private:
#if defined(VQKERNELS_X86)
  static constexpr uint64_t kFlush = 0x8040;  // flush to zero, denormals are zero
  static uint64_t get() { return _mm_getcsr(); }
  static void set(uint64_t mode) { _mm_setcsr(static_cast<unsigned>(mode)); }
#elif defined(__aarch64__)
  static constexpr uint64_t kFlush = uint64_t{1} << 24;
  static uint64_t get() {
    uint64_t mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void set(uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
  static constexpr uint64_t kFlush = 0;
  static uint64_t get() { return 0; }
  static void set(uint64_t) {}
#endif

  const uint64_t before_;
};

}  // namespace vqkernels::cpu
