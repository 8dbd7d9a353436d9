/* The rows of a `tensor_table.TensorTable` one after the other, by the numbers of
   `launch_numbers.LaunchNumbers`:
   each is cut where a threshold changes, and summed by the kernels of `one_pass.c`. */
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { DENSE, BAND, RANDOM, RANKED };
enum { OF_WEIGHT, OF_SCALE, OF_LOW, OF_LOW_AFTER, OF_HIGH, OF_HIGH_AFTER, OF_P_LOW, OF_P_STEP, FLOATS };
enum { OF_KEY, OF_ODD, OF_BOUND, OF_LAST, OF_HIGH_LAST, INTEGERS };
enum { FLOAT16 = 2, FEW = 4, MOST_SOURCES = 64, NUMBERS = 6 };
static const int32_t MOST = 0x7fffffff;

int sweep_few(
    int sources, int kind, int type, int64_t from, int64_t to, const void *base, const void *const *x,
    void *out, const float *f, const int32_t *k, const uint16_t *const *ranks, int elect, int divide,
    float divisor, float lambda
);
int sweep(
    int sources, int64_t from, int64_t to, const void *base, int base_type, const void *const *x,
    const int32_t *types, void *out, int out_type, const int32_t *kinds, const float *f, const int32_t *k,
    const uint16_t *const *ranks, int elect, int divide, float divisor, float lambda
);

/* The first index from `at` on at which a threshold of a source changes, at most `to`. */
static int64_t next_cut(const int32_t *integers, int sources, int64_t at, int64_t to) {
    for (int i = 0; i < sources; i++)
        for (int column = OF_LAST; column <= OF_HIGH_LAST; column++) {
            const int64_t cut = (int64_t)integers[i * INTEGERS + column] + 1;
            if (at < cut && cut < to) to = cut;
        }
    return to;
}

/* The numbers of the kernels for elements from `at` to the next cut. few: as `sweep_few` takes them. */
static void numbers_at(
    const float *floats, const int32_t *integers, int sources, int kind, int64_t at, int few, int32_t *kinds,
    float *f, int32_t *k
) {
    for (int i = 0; i < sources; i++, floats += FLOATS, integers += INTEGERS, f += NUMBERS, k += 3) {
        const int is_whole = kind == RANKED && floats[OF_P_LOW] >= 1 && floats[OF_P_STEP] == 0;
        const float of_source[NUMBERS] = {
            floats[OF_WEIGHT],
            floats[OF_SCALE],
            floats[at <= integers[OF_LAST] ? OF_LOW : OF_LOW_AFTER],
            floats[at <= integers[OF_HIGH_LAST] ? OF_HIGH : OF_HIGH_AFTER],
            few && is_whole ? INFINITY : floats[OF_P_LOW],
            floats[OF_P_STEP],
        };
        memcpy(f, of_source, sizeof of_source);
        memcpy(k, integers, 3 * sizeof *k);
        kinds[i] = kind;
        if (few || kind == BAND) continue;
        if (kind == RANDOM && integers[OF_BOUND] < MOST) k[2]++;
        else if (kind != RANKED || is_whole) kinds[i] = DENSE;
    }
}

/* Elements [from, to) of all rows as if they followed each other. Writes a 1 into the flag of a row of which
   a result is not finite. Returns nonzero where there is no memory or there are too many sources. */
int sweep_rows(
    int64_t rows, int sources, int64_t from, int64_t to, const int64_t *sizes, const int64_t *addresses,
    const int64_t *ranks, const int32_t *types, int based, int kind, int bounded, int elect, int division,
    const float *floats, const int32_t *integers, const float *totals, int32_t *flags
) {
    int32_t kinds[MOST_SOURCES], k[MOST_SOURCES * 3];
    float f[MOST_SOURCES * NUMBERS];
    if (sources > MOST_SOURCES) return -1;
    int one_type = types[0] != FLOAT16 && types[1] == types[0];
    for (int i = 0; i < sources; i++) one_type &= types[2 + i] == types[0];
    const int few = sources <= FEW && one_type && !bounded;
    int64_t first = 0;
    for (int64_t row = 0; row < rows && first < to; first += sizes[row], row++) {
        const int64_t start = from > first ? from - first : 0;
        const int64_t stop = to - first < sizes[row] ? to - first : sizes[row];
        const int64_t *of_row = addresses + row * (sources + 2);
        const float *row_floats = floats + row * sources * FLOATS;
        const int32_t *row_integers = integers + row * sources * INTEGERS;
        void *out = (void *)(intptr_t)of_row[0];
        const void *base = based ? (const void *)(intptr_t)of_row[1] : NULL;
        const void *x[MOST_SOURCES];
        const uint16_t *rank[MOST_SOURCES];
        for (int i = 0; i < sources; i++) {
            x[i] = (const void *)(intptr_t)of_row[2 + i];
            rank[i] = (const uint16_t *)(intptr_t)ranks[row * sources + i];
        }
        const float divisor = totals[row * 2], lambda = totals[row * 2 + 1];
        const int divide = division == 1 && divisor == 1 ? 0 : division;
        for (int64_t at = start; at < stop;) {
            const int64_t end = kind == BAND ? next_cut(row_integers, sources, at, stop) : stop;
            numbers_at(row_floats, row_integers, sources, kind, at, few, kinds, f, k);
            const int bad = few
                ? sweep_few(
                      sources, kind, types[0], at, end, base, x, out, f, k, rank, elect, divide, divisor,
                      lambda
                  )
                : sweep(
                      sources, at, end, base, types[1], x, types + 2, out, types[0], kinds, f, k, rank, elect,
                      divide, divisor, lambda
                  );
            if (bad < 0) return -1;
            flags[row] |= bad;
            at = end;
        }
    }
    return 0;
}
