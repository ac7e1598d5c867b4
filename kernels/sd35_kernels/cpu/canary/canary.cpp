// A fixed amount of arithmetic on registers, to see how fast the cores are at this moment.
//
// The idea: a neighbour in the other half of a core halves its speed and no counter of the system
// says so; another process on the core takes its time slice. A loop without memory, one thread a
// core, sees both. It ends when the slowest thread has ended, as the work beside it does.
// Cost: 7.5 million cycles a thread, 3 ms at 2.5 GHz with two multiply-add units. Where there are
// AMX tiles, one half of the cycles are theirs, since 8-bit and bfloat16 products run there.
#include <immintrin.h>

#include <cstdint>

#ifdef __AMX_INT8__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int64_t LANES = 16, REGISTERS = 24, ROUND_CYCLES = 12;
#else
constexpr int64_t LANES = 8, REGISTERS = 12, ROUND_CYCLES = 6;
#endif
constexpr int64_t CYCLES = 7'500'000;
typedef float vfloat __attribute__((vector_size(LANES * 4)));

// Operations of so many rounds, a multiply-add counted as two.
double multiply_adds(int64_t rounds) {
  vfloat acc[REGISTERS] = {}, x = vfloat{} + 0.5f;
  for (int64_t i = 0; i < rounds; i++)
#pragma GCC unroll 24
    for (int r = 0; r < REGISTERS; r++) {
      acc[r] = acc[r] * x + x;
      asm volatile("" : "+v"(acc[r]));
    }
  return 2.0 * rounds * REGISTERS * LANES;
}

#ifdef __AMX_INT8__
constexpr int64_t TILE_CYCLES = 64;  // four products of 16 cycles

bool tiles() {
  static const bool allowed = !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18);
  return allowed;
}

double tile_products(int64_t rounds) {
  alignas(64) uint8_t config[64] = {};
  config[0] = 1;
  for (int i = 0; i < 8; i++) config[16 + 2 * i] = 64, config[48 + i] = 16;
  // g++ 12 believes that only 8 bytes are read and would drop the stores above.
  asm volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  for (int64_t i = 0; i < rounds; i++) {
    _tile_dpbusd(0, 4, 5);
    _tile_dpbusd(1, 4, 5);
    _tile_dpbusd(2, 4, 5);
    _tile_dpbusd(3, 4, 5);
  }
  _tile_release();
  return 32768.0 * 4 * rounds;
}
#else
bool tiles() { return false; }
double tile_products(int64_t) { return 0; }
constexpr int64_t TILE_CYCLES = 1;
#endif

}  // namespace

extern "C" {

// Whether the loop uses AMX tiles here.
int sd35_canary_tiles() { return tiles(); }

// Run the loop on `threads` threads; returns the operations of all.
double sd35_canary(int64_t threads) {
  double operations = 0;
  const bool both = tiles();
  const int64_t cycles = both ? CYCLES / 2 : CYCLES;
#pragma omp parallel num_threads(static_cast<int>(threads)) reduction(+ : operations)
  {
    operations += multiply_adds(cycles / ROUND_CYCLES);
    if (both) operations += tile_products(cycles / TILE_CYCLES);
  }
  return operations;
}
}
