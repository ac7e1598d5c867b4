// What Python calls, through ctypes: packing, one step, and single operations for tests and benchmarks.
#include "mmdit.h"
#include "peak.h"

using namespace sd35;

extern "C" {

// Sizes of the structures, which the caller compares with its own.
void sd35_sizes(int64_t* sizes) {
  sizes[0] = sizeof(Linear), sizes[1] = sizeof(Block), sizes[2] = sizeof(Model), sizes[3] = sizeof(Step);
}

void sd35_pack_float(const float* w, int64_t n, int64_t k, float* packed) { pack_float(w, n, k, packed); }

void sd35_pack_half(const float* w, int64_t n, int64_t k, uint16_t* packed) { pack_half(w, n, k, packed); }

void sd35_pack_int8(const float* w, int64_t n, int64_t k, int64_t chunk, int8_t* packed, float* scale,
                    int32_t* start) {
  pack_int8(w, n, k, chunk, packed, scale, start);
}

int64_t sd35_scratch_bytes(const Model* model, const Step* s) { return scratch_bytes(*model, *s); }

// Whether the tiers on tiles can run: 0 where the system keeps AMX tiles back.
int64_t sd35_tiles_ready() {
#ifdef SD35_AMX
  if (!tiles_begin()) return 0;
  tiles_end();
#endif
  return 1;
}

double sd35_peak(int64_t kind, int64_t threads) { return peak(kind, threads); }

void sd35_step(const Model* model, const Step* s) { step(*model, *s); }
}
