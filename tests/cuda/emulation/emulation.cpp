#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace {

constexpr int kDefaultSharedBytes = 48 * 1024;  // of a block that asks for no more
constexpr int kMaxSharedBytes = 227 * 1024;
constexpr int kReservedSharedBytes = 1024;  // of a processor's memory, for each block
constexpr size_t kGuardBytes = 1024;
constexpr unsigned char kGuard = 0xa5;
constexpr unsigned char kPoison = 0xff;  // NaN as float and double
constexpr size_t kStackBytes = 64 * 1024;
constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;

}  // namespace

alignas(16) unsigned char vqkernels_shared[kMaxSharedBytes + kGuardBytes];

namespace emulation {
namespace {

enum class State { ready, in_warp, in_block, ended };

// A context starts a thread; jumps, which leave the signal mask alone and so need no system call, change between them.
struct Thread {
  ucontext_t context;
  jmp_buf position;
  State state;
  const char* place;
  unsigned mask;
  uint64_t value;
  std::vector<char> stack;
};

bool descending = false;
int multiprocessors = 1;
int64_t launches = 0;
int processor_shared_bytes = kMaxSharedBytes + kReservedSharedBytes;
std::map<const void*, int> shared_limits;  // of kernels that have asked for more
std::string message;

std::vector<Thread> threads(kMaxThreads);
int thread_count = 0;
int current = 0;
jmp_buf scheduler;
const std::function<void()>* body = nullptr;
uint64_t exchanged[kMaxThreads / kWarp][kWarp];
bool predicates[kMaxThreads];

// A thread's fiber serves the thread of that number of one block after the other.
void run_bodies() {
  while (true) {
    (*body)();
    threads[current].state = State::ended;
    if (_setjmp(threads[current].position) == 0) _longjmp(scheduler, 1);
  }
}

// Runs the current thread until it waits or ends.
void resume() {
  Thread& thread = threads[current];
  if (_setjmp(scheduler) != 0) return;
  if (!thread.stack.empty()) _longjmp(thread.position, 1);
  thread.stack.resize(kStackBytes);
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.data();
  thread.context.uc_stack.ss_size = kStackBytes;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, run_bodies, 0);
  setcontext(&thread.context);
}

void wait(State state, const char* place) {
  Thread& thread = threads[current];
  thread.state = state;
  thread.place = place;
  if (_setjmp(thread.position) == 0) _longjmp(scheduler, 1);
}

// Runs every thread of the warp that can run until it waits or ends.
bool run_ready(int warp) {
  bool any = false;
  for (int n = 0; n < kWarp; ++n) {
    const int i = warp * kWarp + (descending ? kWarp - 1 - n : n);
    if (threads[i].state != State::ready) continue;
    any = true;
    current = i;
    threadIdx.x = static_cast<unsigned>(i);
    resume();
  }
  return any;
}

std::string where(const Thread& t) {
  return "thread " + std::to_string(&t - threads.data()) +
         (t.state == State::ended ? " has ended" : std::string(" waits at ") + t.place);
}

// Lets threads of a warp go on that wait for each other and are all there.
void release_warp(int warp) {
  Thread* const lanes = &threads[warp * kWarp];
  for (int i = 0; i < kWarp; ++i) {
    const Thread& one = lanes[i];
    if (one.state != State::in_warp) continue;
    const unsigned mask = one.mask;
    bool all = true;
    for (int j = 0; j < kWarp; ++j) {
      const Thread& t = lanes[j];
      if (mask >> j & 1u) all = all && t.state == State::in_warp && t.place == one.place && t.mask == mask;
    }
    if (!all) continue;
    for (int j = 0; j < kWarp; ++j) {
      if (!(mask >> j & 1u)) continue;
      exchanged[warp][j] = lanes[j].value;
      lanes[j].state = State::ready;
    }
  }
}

// Lets the block go on where all of it waits at one barrier.
bool release_block() {
  for (int i = 0; i < thread_count; ++i) {
    if (threads[i].state != State::in_block || threads[i].place != threads[0].place) return false;
  }
  for (int i = 0; i < thread_count; ++i) threads[i].state = State::ready;
  return true;
}

bool run_block(size_t shared_bytes) {
  std::memset(vqkernels_shared, kPoison, shared_bytes);
  std::memset(vqkernels_shared + shared_bytes, kGuard, kGuardBytes);
  for (int i = 0; i < thread_count; ++i) threads[i].state = State::ready;
  // A warp runs as far ahead of the others as barriers let it.
  do {
    for (int n = 0; n < thread_count / kWarp; ++n) {
      const int warp = descending ? thread_count / kWarp - 1 - n : n;
      while (run_ready(warp)) release_warp(warp);
    }
  } while (release_block());
  const auto stuck = std::find_if(threads.begin(), threads.begin() + thread_count,
                                  [](const Thread& t) { return t.state != State::ended; });
  if (stuck != threads.begin() + thread_count) {
    const auto other = std::find_if(threads.begin(), threads.begin() + thread_count, [&](const Thread& t) {
      return t.state != stuck->state || t.place != stuck->place;
    });
    message = "barrier divergence in block " + std::to_string(blockIdx.x) + ": " + where(*stuck);
    if (other != threads.begin() + thread_count) message += ", " + where(*other);
    for (Thread& thread : threads) thread.stack.clear();  // fibers that wait for ever are given up
    return false;
  }
  for (size_t i = 0; i < kGuardBytes; ++i) {
    if (vqkernels_shared[shared_bytes + i] == kGuard) continue;
    message = "block " + std::to_string(blockIdx.x) + " wrote behind its shared memory";
    return false;
  }
  return true;
}

}  // namespace

int lane() { return current % kWarp; }

void synchronize_block(const char* place) { wait(State::in_block, place); }

bool any_of_block(const char* place, bool predicate) {
  predicates[current] = predicate;
  wait(State::in_block, place);
  const bool any = std::find(predicates, predicates + thread_count, true) != predicates + thread_count;
  wait(State::in_block, place);
  return any;
}

const uint64_t* exchange(const char* place, unsigned mask, uint64_t value) {
  threads[current].mask = mask;
  threads[current].value = value;
  wait(State::in_warp, place);
  return exchanged[current / kWarp];
}

cudaError_t run(const void* kernel, const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  thread_count = static_cast<int>(config.blockDim.x);
  if (config.gridDim.x == 0 || thread_count == 0 || thread_count > kMaxThreads || thread_count % kWarp != 0) {
    return cudaErrorInvalidConfiguration;
  }
  const auto asked = shared_limits.find(kernel);
  const int limit = asked == shared_limits.end() ? kDefaultSharedBytes : asked->second;
  if (config.dynamicSmemBytes > static_cast<size_t>(limit)) return cudaErrorInvalidValue;
  ++launches;
  body = &thread;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  for (unsigned n = 0; n < gridDim.x; ++n) {
    blockIdx.x = descending ? gridDim.x - 1 - n : n;
    if (!run_block(config.dynamicSmemBytes)) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

int64_t count_launches() {
  const int64_t count = launches;
  launches = 0;
  return count;
}

void configure(int processors, int shared_bytes, bool descending_order) {
  multiprocessors = processors;
  processor_shared_bytes = shared_bytes;
  descending = descending_order;
}

}  // namespace emulation

const char* cudaGetErrorString(cudaError_t status) {
  switch (status) {
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    default:
      return emulation::message.c_str();
  }
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? emulation::multiprocessors : emulation::processor_shared_bytes;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value > emulation::processor_shared_bytes - kReservedSharedBytes) return cudaErrorInvalidValue;
  emulation::shared_limits[kernel] = value;
  return cudaSuccess;
}
