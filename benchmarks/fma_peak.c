// How many multiply-adds a second one core can do in float: the limit that a search of rows against codes has.
#if defined(__AVX512F__)
#define BYTES 64
#define CHAINS 24
#define REGISTER "+v"
#elif defined(__AVX__)
#define BYTES 32
#define CHAINS 12
#define REGISTER "+x"
#elif defined(__SSE__)
#define BYTES 16
#define CHAINS 12
#define REGISTER "+x"
#else
#define BYTES 16
#define CHAINS 24
#define REGISTER "+w"
#endif

typedef float vec __attribute__((vector_size(BYTES)));

// Runs `steps` rounds of one multiply-add in each of CHAINS independent vectors, as many as stay in registers
// beside the two operands, and returns how many floating point operations that was. The chains start at different
// values and pass an empty asm every round, so that the compiler can neither merge nor drop them.
double fma_flops(long steps) {
  vec a = {0}, b = {0}, chain[CHAINS];
  a += 0.999f;
  b += 0.001f;
  __asm__ volatile("" : REGISTER(a), REGISTER(b));
#pragma GCC unroll 24
  for (int i = 0; i < CHAINS; ++i) chain[i] = a * (float)i;
  for (long step = 0; step < steps; ++step) {
#pragma GCC unroll 24
    for (int i = 0; i < CHAINS; ++i) {
      chain[i] = chain[i] * a + b;
      __asm__ volatile("" : REGISTER(chain[i]));
    }
  }
  return 2.0 * CHAINS * (BYTES / sizeof(float)) * (double)steps;
}
