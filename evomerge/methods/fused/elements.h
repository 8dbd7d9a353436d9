/* What the kernels share: blocks of elements as floats, and hashes of indices. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 1024
enum { FLOAT32, BFLOAT16, FLOAT16 };

static inline void load(float *restrict to, const void *from, int type, int64_t at, int n) {
    if (type == FLOAT32) {
        memcpy(to, (const float *)from + at, (size_t)n * 4);
    } else if (type == BFLOAT16) {
        const uint16_t *restrict x = (const uint16_t *)from + at;
        for (int j = 0; j < n; j++) {
            uint32_t bits = (uint32_t)x[j] << 16;
            memcpy(to + j, &bits, 4);
        }
    } else {
        const _Float16 *restrict x = (const _Float16 *)from + at;
        for (int j = 0; j < n; j++) to[j] = (float)x[j];
    }
}

static inline void difference(float *restrict d, const float *restrict b, int n) {
    for (int j = 0; j < n; j++) d[j] -= b[j];
}

static inline uint32_t mix(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

static inline void indices(uint32_t *restrict h, int64_t first, int n) {
    for (int j = 0; j < n; j++) h[j] = mix((uint32_t)first + (uint32_t)j);
}

static inline uint32_t bits_of(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}

static inline float value_of(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
