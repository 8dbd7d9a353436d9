/* The sums of task vectors of one tensor in one pass: the kernels of `torch_kernels.py` in C, bit for bit.

   Blocks of BLOCK elements stay in the first-level cache; loops are written for the compiler to vectorise.
   Compile with -ffp-contract=off and without -ffast-math: every operation is one IEEE operation, as in
   torch. */
#include "elements.h"

enum { DENSE, BAND, RANDOM, RANKED };
enum { WEIGHT, SCALE, LOW, HIGH, P_LOW, P_STEP, NUMBERS };

/* Rounds to nearest, ties to even. Returns 1 if a value is not finite. */
static int store(void *to, const float *restrict from, int type, int64_t at, int n) {
    uint32_t bad = 0;
    if (type == FLOAT32) {
        memcpy((float *)to + at, from, (size_t)n * 4);
        for (int j = 0; j < n; j++) bad |= !(fabsf(from[j]) < INFINITY);
    } else if (type == BFLOAT16) {
        uint16_t *restrict o = (uint16_t *)to + at;
        for (int j = 0; j < n; j++) {
            uint32_t bits, up;
            memcpy(&bits, from + j, 4);
            up = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
            up = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : up;
            bad |= (up & 0x7f80) == 0x7f80;
            o[j] = (uint16_t)up;
        }
    } else {
        _Float16 *restrict o = (_Float16 *)to + at;
        for (int j = 0; j < n; j++) {
            o[j] = (_Float16)from[j];
            bad |= !(fabsf((float)o[j]) < INFINITY);
        }
    }
    return bad != 0;
}

/* d: differences, masked in place; h: mixed element indices. */
static void mask(
    float *restrict d, const uint32_t *restrict h, int kind, const float *f, const int32_t *k,
    const uint16_t *restrict rank, int n
) {
    if (kind == BAND) {
        const float low = f[LOW], high = f[HIGH]; /* high is NaN where there is no upper bound */
        for (int j = 0; j < n; j++) {
            float a = fabsf(d[j]);
            d[j] = (a < low) | (a >= high) ? 0.0f : d[j];
        }
    } else if (kind == RANDOM) {
        const uint32_t key = (uint32_t)k[0], odd = (uint32_t)k[1];
        const int32_t bound = k[2];
        for (int j = 0; j < n; j++) d[j] = (int32_t)((h[j] ^ key) * odd) < bound ? d[j] : 0.0f;
    } else if (kind == RANKED) {
        const uint32_t key = (uint32_t)k[0], odd = (uint32_t)k[1];
        const float low = f[P_LOW], step = f[P_STEP];
        for (int j = 0; j < n; j++) {
            float p = low + (float)rank[j] * step;
            d[j] = (float)(int32_t)((h[j] ^ key) * odd) < p * 4294967296.0f - 2147483648.0f ? d[j] : 0.0f;
        }
    }
}

/* The same for sources, base and output of one type, at most FEW sources and one kind of mask: everything
   in registers. The arguments before `n` are constants at every call, so that each call becomes a loop of
   its own. */
#define FEW 4

static inline __attribute__((always_inline)) float widen(const void *x, int type, int64_t j) {
    if (type == FLOAT32) return ((const float *)x)[j];
    uint32_t bits = (uint32_t)((const uint16_t *)x)[j] << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline __attribute__((always_inline)) int few(
    int sources, int kind, int type, int elect, int based, int64_t from, int64_t to,
    const void *restrict base, const void *const *x, void *restrict out, const float *numbers,
    const int32_t *keys, const uint16_t *const *ranks, int divide, float divisor, float lambda
) {
    float weight[FEW], scale[FEW], low[FEW], p_low[FEW], p_step[FEW];
    uint32_t key[FEW], odd[FEW], bad = 0;
    int32_t bound[FEW];
    const void *restrict source[FEW];
    const uint16_t *restrict rank[FEW];
    for (int i = 0; i < sources; i++) {
        weight[i] = numbers[i * NUMBERS + WEIGHT];
        scale[i] = numbers[i * NUMBERS + SCALE];
        low[i] = numbers[i * NUMBERS + LOW];
        key[i] = (uint32_t)keys[i * 3];
        odd[i] = (uint32_t)keys[i * 3 + 1];
        bound[i] = keys[i * 3 + 2];
        p_low[i] = numbers[i * NUMBERS + P_LOW];
        p_step[i] = numbers[i * NUMBERS + P_STEP];
        source[i] = x[i];
        rank[i] = kind == RANKED ? ranks[i] : NULL;
    }
    for (int64_t j = from; j < to; j++) {
        const float b = based ? widen(base, type, j) : 0.0f;
        const uint32_t h = kind == RANDOM || kind == RANKED ? mix((uint32_t)j) : 0;
        float y[FEW], sum = 0, agreed = 0;
        for (int i = 0; i < sources; i++) {
            float d = widen(source[i], type, j);
            if (based) d -= b;
            if (kind == BAND) d = fabsf(d) < low[i] ? 0.0f : d;
            if (kind == RANDOM) d = (int32_t)((h ^ key[i]) * odd[i]) <= bound[i] ? d : 0.0f;
            if (kind == RANKED) {
                const float p = p_low[i] + (float)rank[i][j] * p_step[i];
                const int32_t hash = (int32_t)((h ^ key[i]) * odd[i]);
                d = (float)hash < p * 4294967296.0f - 2147483648.0f ? d : 0.0f;
            }
            /* without a mask the scale is 1 */
            y[i] = kind == DENSE ? d * weight[i] : d * scale[i] * weight[i];
            sum += y[i];
        }
        if (elect) {
            const float sign = sum >= 0 ? 1.0f : -1.0f;
            sum = 0;
            for (int i = 0; i < sources; i++) {
                float t = y[i] * sign;
                sum += t <= 0 ? 0.0f : t;
                agreed += t > 0 ? weight[i] : 0.0f;
            }
            sum *= sign;
        }
        if (divide == 1) sum /= divisor;
        if (divide == 2) sum /= fabsf(agreed) < 1e-6f ? 1.0f : agreed;
        const float result = b + sum * lambda;
        uint32_t bits;
        memcpy(&bits, &result, 4);
        if (type == FLOAT32) {
            ((float *)out)[j] = result;
            bad |= (bits & 0x7f800000) == 0x7f800000;
        } else {
            uint32_t up = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
            up = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : up;
            ((uint16_t *)out)[j] = (uint16_t)up;
            bad |= (up & 0x7f80) == 0x7f80;
        }
    }
    return bad != 0;
}

#define RUN(n, kind, type, elect, based, divide) \
    return few(n, kind, type, elect, based, from, to, base, x, out, f, k, ranks, divide, divisor, lambda)
#define SUMMED(n, kind, type) \
    if (elect && divide) RUN(n, kind, type, 1, 1, 2); \
    if (elect) RUN(n, kind, type, 1, 1, 0); \
    if (divide) RUN(n, kind, type, 0, 1, 1); \
    RUN(n, kind, type, 0, 1, 0);
#define MASKED(n, type) \
    if (!base && divide) RUN(n, DENSE, type, 0, 0, 1); \
    if (!base) RUN(n, DENSE, type, 0, 0, 0); \
    if (kind == RANDOM) { SUMMED(n, RANDOM, type) } \
    if (kind == RANKED) { SUMMED(n, RANKED, type) } \
    if (kind == DENSE) { SUMMED(n, DENSE, type) } \
    SUMMED(n, BAND, type)
#define TYPED(n) \
    case n: \
        if (type == FLOAT32) { MASKED(n, FLOAT32) } \
        MASKED(n, BFLOAT16)

/* sources in [1, FEW]; type: FLOAT32 or BFLOAT16; kind: DENSE, BAND without upper bound, RANDOM with an
   inclusive bound, or RANKED, where a P_LOW of infinity keeps everything; with `elect`, divide is 0 or 2,
   without it 0 or 1. Without a base nothing is masked. */
int sweep_few(
    int sources, int kind, int type, int64_t from, int64_t to, const void *base, const void *const *x,
    void *out, const float *f, const int32_t *k, const uint16_t *const *ranks, int elect, int divide,
    float divisor, float lambda
) {
    switch (sources) {
        TYPED(1)
        TYPED(2)
        TYPED(3)
        TYPED(4)
    }
    return -1;
}

/* Elements [from, to) of a tensor. base may be NULL. f: [sources][NUMBERS]; k: [sources][3]. elect: sum
   only what has the sign of the sum. divide: 0 no, 1 by `divisor`, 2 by the weights that agree. Returns 1
   if a result is not finite, -1 without memory. */
int sweep(
    int sources, int64_t from, int64_t to, const void *base, int base_type, const void *const *x,
    const int32_t *types, void *out, int out_type, const int32_t *kinds, const float *f, const int32_t *k,
    const uint16_t *const *ranks, int elect, int divide, float divisor, float lambda
) {
    float *work = malloc((size_t)(sources + 4) * BLOCK * 4);
    if (!work) return -1;
    float *restrict b = work, *restrict sum = work + BLOCK, *restrict agreed = work + 2 * BLOCK;
    uint32_t *restrict h = (uint32_t *)(work + 3 * BLOCK);
    float *ys = work + 4 * BLOCK;
    int bad = 0, hashed = 0;
    memset(b, 0, BLOCK * 4);
    for (int i = 0; i < sources; i++) hashed |= kinds[i] == RANDOM || kinds[i] == RANKED;
    for (int64_t at = from; at < to; at += BLOCK) {
        const int n = to - at < BLOCK ? (int)(to - at) : BLOCK;
        if (base) load(b, base, base_type, at, n);
        if (hashed) indices(h, at, n);
        memset(sum, 0, BLOCK * 4);
        for (int i = 0; i < sources; i++) {
            float *restrict y = ys + (int64_t)i * BLOCK;
            const float weight = f[i * NUMBERS + WEIGHT], scale = f[i * NUMBERS + SCALE];
            load(y, x[i], types[i], at, n);
            if (base) difference(y, b, n);
            mask(y, h, kinds[i], f + i * NUMBERS, k + i * 3, kinds[i] == RANKED ? ranks[i] + at : NULL, n);
            for (int j = 0; j < n; j++) {
                y[j] = y[j] * scale * weight;
                sum[j] += y[j];
            }
        }
        if (elect) {
            float *restrict sign = (float *)h; /* h is free now */
            for (int j = 0; j < n; j++) {
                sign[j] = sum[j] >= 0 ? 1.0f : -1.0f;
                sum[j] = 0;
                agreed[j] = 0;
            }
            for (int i = 0; i < sources; i++) {
                const float *restrict y = ys + (int64_t)i * BLOCK;
                const float weight = f[i * NUMBERS + WEIGHT];
                for (int j = 0; j < n; j++) {
                    float t = y[j] * sign[j];
                    sum[j] += t <= 0 ? 0.0f : t;
                    agreed[j] += t > 0 ? weight : 0.0f;
                }
            }
            for (int j = 0; j < n; j++) sum[j] *= sign[j];
        }
        if (divide == 1)
            for (int j = 0; j < n; j++) sum[j] /= divisor;
        if (divide == 2)
            for (int j = 0; j < n; j++) sum[j] /= fabsf(agreed[j]) < 1e-6f ? 1.0f : agreed[j];
        for (int j = 0; j < n; j++) sum[j] = b[j] + sum[j] * lambda;
        bad |= store(out, sum, out_type, at, n);
    }
    free(work);
    return bad;
}

/* Adds to totals[0] the sum of floor(|x - base| * unit), and to totals[1] that of the elements kept. */
int norms(
    int64_t from, int64_t to, const void *base, int base_type, const void *x, int type, int kind,
    const float *f, const int32_t *k, const uint16_t *rank, float unit, double *totals
) {
    float b[BLOCK], d[BLOCK], a[BLOCK];
    uint32_t h[BLOCK];
    for (int64_t at = from; at < to; at += BLOCK) {
        const int n = to - at < BLOCK ? (int)(to - at) : BLOCK;
        double all = 0, kept = 0; /* whole numbers below 2^53: exact in any order */
        load(b, base, base_type, at, n);
        load(d, x, type, at, n);
        difference(d, b, n);
        for (int j = 0; j < n; j++) a[j] = floorf(fabsf(d[j]) * unit);
#pragma omp simd reduction(+ : all)
        for (int j = 0; j < n; j++) all += a[j];
        indices(h, at, n);
        mask(d, h, kind, f, k, rank ? rank + at : NULL, n);
        for (int j = 0; j < n; j++) a[j] = floorf(fabsf(d[j]) * unit);
#pragma omp simd reduction(+ : kept)
        for (int j = 0; j < n; j++) kept += a[j];
        totals[0] += all;
        totals[1] += kept;
    }
    return 0;
}

/* tops[sources]: bits of the largest |x_i - base|, or |x_i| without a base; raised, never lowered. Bits of
   infinity and NaN are the largest. */
int largest(
    int sources, int64_t from, int64_t to, const void *base, int base_type, const void *const *x,
    const int32_t *types, uint32_t *tops
) {
    float b[BLOCK], d[BLOCK];
    for (int64_t at = from; at < to; at += BLOCK) {
        const int n = to - at < BLOCK ? (int)(to - at) : BLOCK;
        if (base) load(b, base, base_type, at, n);
        for (int i = 0; i < sources; i++) {
            uint32_t top = tops[i];
            load(d, x[i], types[i], at, n);
            if (base) difference(d, b, n);
            for (int j = 0; j < n; j++) {
                uint32_t bits;
                memcpy(&bits, d + j, 4);
                bits &= 0x7fffffff;
                top = bits > top ? bits : top;
            }
            tops[i] = top;
        }
    }
    return 0;
}

/* a * b + c; a * b is exact in double for products of floats, so that both give the same bits. */
static inline double multiply_add(double a, double b, double c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fma(a, b, c);
#else
    return a * b + c;
#endif
}

/* Adds to sums[pairs][2] what `exact_products.py` defines, of the vectors x_i - base, or x_i without a base:
   the sums of the rounded products, and of what rounding left. which: [pairs][2], numbers of two vectors.
   magic: [pairs][2], 1.5 * 2**52 units and 1.5 * 2**52 units of the rest: adding such a number rounds to
   whole units, which are then the last bits of the sum. At most 2**23 elements. Returns -1 without memory. */
int products(
    int sources, int64_t from, int64_t to, const void *base, int base_type, const void *const *x,
    const int32_t *types, int pairs, const int32_t *which, const double *magic, int64_t *sums
) {
    double *work = malloc((size_t)sources * BLOCK * 8);
    if (!work) return -1;
    float b[BLOCK], d[BLOCK];
    for (int64_t at = from; at < to; at += BLOCK) {
        const int n = to - at < BLOCK ? (int)(to - at) : BLOCK;
        if (base) load(b, base, base_type, at, n);
        for (int i = 0; i < sources; i++) {
            double *wide = work + (size_t)i * BLOCK;
            load(d, x[i], types[i], at, n);
            if (base) difference(d, b, n);
            for (int j = 0; j < n; j++) wide[j] = d[j];
        }
        for (int p = 0; p < pairs; p++) {
            const double *restrict a = work + (size_t)which[p * 2] * BLOCK;
            const double *restrict c = work + (size_t)which[p * 2 + 1] * BLOCK;
            const double unit = magic[p * 2], fine = magic[p * 2 + 1];
            uint64_t whole = 0, rest = 0, unit_bits, fine_bits;
#pragma omp simd reduction(+ : whole, rest)
            for (int j = 0; j < n; j++) {
                const double rounded = multiply_add(a[j], c[j], unit);
                const double left = multiply_add(a[j], c[j], -(rounded - unit)) + fine;
                uint64_t bits;
                memcpy(&bits, &rounded, 8);
                whole += bits;
                memcpy(&bits, &left, 8);
                rest += bits;
            }
            memcpy(&unit_bits, &unit, 8);
            memcpy(&fine_bits, &fine, 8);
            sums[p * 2] += (int64_t)(whole - (uint64_t)n * unit_bits);
            sums[p * 2 + 1] += (int64_t)(rest - (uint64_t)n * fine_bits);
        }
    }
    free(work);
    return 0;
}

/* Adds to products[sources] the dot products of g with x_i - base, or with x_i without a base, in 64-bit
   floats. */
int projections(
    int sources, int64_t from, int64_t to, const void *gradient, int gradient_type, const void *base,
    int base_type, const void *const *x, const int32_t *types, double *products
) {
    float g[BLOCK], b[BLOCK], d[BLOCK];
    for (int64_t at = from; at < to; at += BLOCK) {
        const int n = to - at < BLOCK ? (int)(to - at) : BLOCK;
        load(g, gradient, gradient_type, at, n);
        if (base) load(b, base, base_type, at, n);
        for (int i = 0; i < sources; i++) {
            double sum = 0;
            load(d, x[i], types[i], at, n);
            if (base) difference(d, b, n);
#pragma omp simd reduction(+ : sum)
            for (int j = 0; j < n; j++) sum += (double)g[j] * (double)d[j];
            products[i] += sum;
        }
    }
    return 0;
}
