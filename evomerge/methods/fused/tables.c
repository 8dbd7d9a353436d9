/* Tables of the magnitudes |x - base| of one tensor: thresholds of the k largest, norms, ranks within rows.

   The k largest are found by radix: a magnitude's 31 bits are a bucket (the upper 19) and the lower 12. Most
   buckets of differences of 16-bit floats hold one value, whose lower bits are 0, so that counting buckets is
   nearly all; other values of the buckets that a k falls into are listed and sorted. A second pass finds the
   last of the elements at each threshold. Every pass works on a span of the elements: threads share it. */
#include "elements.h"
#ifdef __linux__
#include <sys/mman.h>
#endif

enum { BUCKETS = 1 << 19, LOW_BITS = 12, LOW = (1 << LOW_BITS) - 1 };

/* bits[n]: bits of |x - base| of a block. */
static inline void magnitudes(
    uint32_t *restrict bits, const void *base, int base_type, const void *x, int type, int64_t at, int n
) {
    float b[BLOCK], d[BLOCK];
    load(b, base, base_type, at, n);
    load(d, x, type, at, n);
    difference(d, b, n);
    for (int j = 0; j < n; j++) bits[j] = bits_of(d[j]) & 0x7fffffff;
}

static inline int block_at(int64_t at, int64_t to) { return to - at < BLOCK ? (int)(to - at) : BLOCK; }

/* counts[BUCKETS]: adds 1 for every element to that of its bucket. list[capacity]: the bits of elements whose
   lower bits are not 0; length: how many, -1 if there is no room for all. */
int count_buckets(
    int64_t from, int64_t to, const void *base, int base_type, const void *x, int type, uint32_t *counts,
    uint32_t *list, int64_t capacity, int64_t *length
) {
    uint32_t bits[BLOCK];
    int64_t listed = 0;
    for (int64_t at = from; at < to; at += BLOCK) {
        const int n = block_at(at, to);
        magnitudes(bits, base, base_type, x, type, at, n);
        for (int j = 0; j < n; j++) counts[bits[j] >> LOW_BITS]++;
        if (listed >= 0 && listed + n > capacity) listed = -1;
        if (listed < 0) continue;
        for (int j = 0; j < n; j++) {
            list[listed] = bits[j];
            listed += (bits[j] & LOW) != 0;
        }
    }
    *length = listed;
    return 0;
}

/* Of each k of ks[count], ascending: the bucket of the k-th largest (buckets) and which of the bucket's
   elements it is, from the largest on (rooms). wanted[BUCKETS], zeros before: 1 for these buckets;
   sizes[spans]: how many elements of each span they hold. Returns 1 if there are fewer than k elements. */
int choose_buckets(
    int spans, const uint32_t *const *counts, int count, const int64_t *ks, uint16_t *wanted,
    int32_t *buckets, int64_t *rooms, int64_t *sizes
) {
    int64_t above = 0;
    int next = 0;
    memset(sizes, 0, (size_t)spans * 8);
    for (int bucket = BUCKETS - 1; bucket >= 0 && next < count; bucket--) {
        int64_t here = 0;
        if (bucket % 8 == 7) { /* most buckets are empty */
            uint64_t any = 0, pair;
            for (int s = 0; s < spans; s++)
                for (int i = 0; i < 8; i += 2) {
                    memcpy(&pair, counts[s] + bucket - 7 + i, 8);
                    any |= pair;
                }
            if (!any) {
                bucket -= 7;
                continue;
            }
        }
        for (int s = 0; s < spans; s++) here += counts[s][bucket];
        if (!here || ks[next] > above + here) {
            above += here;
            continue;
        }
        wanted[bucket] = 1;
        for (int s = 0; s < spans; s++) sizes[s] += counts[s][bucket];
        for (; next < count && ks[next] <= above + here; next++) {
            buckets[next] = bucket;
            rooms[next] = ks[next] - above;
        }
        above += here;
    }
    return next < count;
}

/* list[capacity]: the bits of the elements of wanted buckets whose lower bits are not 0; length: how many. */
int list_inexact(
    int64_t from, int64_t to, const void *base, int base_type, const void *x, int type,
    const uint16_t *wanted, uint32_t *list, int64_t *length
) {
    uint32_t bits[BLOCK];
    int64_t listed = 0;
    for (int64_t at = from; at < to; at += BLOCK) {
        const int n = block_at(at, to);
        magnitudes(bits, base, base_type, x, type, at, n);
        for (int j = 0; j < n; j++) {
            list[listed] = bits[j];
            listed += wanted[bits[j] >> LOW_BITS] && (bits[j] & LOW);
        }
    }
    *length = listed;
    return 0;
}

/* Keeps of list[length] what is in wanted buckets, and sorts it, ascending; length: how many. Returns -1
   without memory. */
int sort_wanted(uint32_t *list, int64_t *length, const uint16_t *wanted) {
    enum { DIGIT = 11, VALUES = 1 << DIGIT };
    int64_t n = 0;
    for (int64_t j = 0; j < *length; j++) {
        list[n] = list[j];
        n += wanted[list[j] >> LOW_BITS] != 0;
    }
    *length = n;
    uint32_t *other = malloc((size_t)(n ? n : 1) * 4), *from = list, *to = other;
    if (!other) return -1;
    for (int shift = 0; shift < 31; shift += DIGIT) {
        int64_t places[VALUES] = {0}, place = 0;
        for (int64_t j = 0; j < n; j++) places[(from[j] >> shift) & (VALUES - 1)]++;
        for (int v = 0; v < VALUES; v++) {
            const int64_t here = places[v];
            places[v] = place;
            place += here;
        }
        for (int64_t j = 0; j < n; j++) to[places[(from[j] >> shift) & (VALUES - 1)]++] = from[j];
        uint32_t *swap = from;
        from = to;
        to = swap;
    }
    memcpy(list, other, (size_t)n * 4); /* three digits: the last went to `other` */
    free(other);
    return 0;
}

/* The first place of list[n], ascending, that is not below `bits`. */
static int64_t lower_bound(const uint32_t *list, int64_t n, uint32_t bits) {
    int64_t low = 0;
    while (low < n) {
        const int64_t middle = low + (n - low) / 2;
        if (list[middle] < bits) low = middle + 1;
        else n = middle;
    }
    return low;
}

/* Of each k the bits of the k-th largest (values), which of the elements of this value it is (rooms, before:
   of the bucket's elements), and how many of them lie in spans before each (come: [spans][count]). lists: the
   sorted lists of each span. Returns -1 without memory, 1 if the counts do not fit together. */
int find_thresholds(
    int spans, const uint32_t *const *counts, const uint32_t *const *lists, const int64_t *lengths, int count,
    const int32_t *buckets, int64_t *rooms, uint32_t *values, int64_t *come
) {
    int64_t *work = malloc((size_t)spans * 3 * 8);
    if (!work) return -1;
    int64_t *low = work, *high = work + spans, *here = work + 2 * spans;
    int status = 0;
    for (int k = 0; k < count && !status;) {
        const uint32_t first = (uint32_t)buckets[k] << LOW_BITS;
        int64_t passed = 0;
        int end = k, is_last = 0;
        while (end < count && buckets[end] == buckets[k]) end++;
        for (int s = 0; s < spans; s++) {
            low[s] = lower_bound(lists[s], lengths[s], first);
            high[s] = lower_bound(lists[s], lengths[s], first + LOW + 1);
            here[s] = high[s] - low[s];
        }
        while (k < end && !is_last) {
            uint32_t value = first; /* what remains last has no lower bits */
            int64_t all = 0;
            for (int s = 0; s < spans; s++)
                if (high[s] > low[s] && lists[s][high[s] - 1] > value) value = lists[s][high[s] - 1];
            is_last = value == first;
            for (int s = 0; s < spans; s++) {
                if (is_last) {
                    const int64_t listed = lower_bound(lists[s], lengths[s], first + LOW + 1) - low[s];
                    here[s] = (int64_t)counts[s][buckets[k]] - listed;
                } else {
                    const int64_t before = high[s];
                    while (high[s] > low[s] && lists[s][high[s] - 1] == value) high[s]--;
                    here[s] = before - high[s];
                }
                all += here[s];
            }
            for (; k < end && rooms[k] <= passed + all; k++) {
                int64_t sum = 0;
                values[k] = value;
                rooms[k] -= passed;
                for (int s = 0; s < spans; s++) {
                    come[(size_t)s * count + k] = sum;
                    sum += here[s];
                }
            }
            passed += all;
        }
        status = k < end;
    }
    free(work);
    return status;
}

/* A threshold while its last elements are looked for. */
enum { SPARE = 8 }; /* entries that count what is no threshold, so that no one counter is waited for */
struct threshold {
    uint32_t value, come, next; /* how many have come, and how many must for the next k; 0 for none left */
    int32_t k;
};

/* Numbers the distinct values[count], descending, from SPARE on, those alone in their bucket first. wanted:
   the number of the first value of each bucket, 0 elsewhere. first[count + SPARE]: the first k of each
   number. Returns how many numbers; alone: the first number that is not alone in its bucket. */
int number_thresholds(int count, const uint32_t *values, uint16_t *wanted, int32_t *first, int32_t *alone) {
    int next = SPARE;
    for (int together = 0; together < 2; together++) {
        for (int k = 0; k < count;) {
            const uint32_t bucket = values[k] >> LOW_BITS;
            int end = k;
            while (end < count && values[end] >> LOW_BITS == bucket) end++;
            if ((values[k] != values[end - 1]) == together) {
                wanted[bucket] = (uint16_t)next;
                for (int j = k; j < end; j++)
                    if (j == k || values[j] != values[j - 1]) first[next++] = j;
            }
            k = end;
        }
        if (!together) *alone = next;
    }
    return next;
}

/* lasts[count]: for each k the index of the last of the k largest, if it is in this span. numbers: the result
   of `number_thresholds`; come: of this span. Returns -1 without memory. */
int find_lasts(
    int64_t from, int64_t to, const void *base, int base_type, const void *x, int type, int count,
    const uint32_t *values, const int64_t *rooms, const int64_t *come, int numbers, int alone,
    const uint16_t *wanted, const int32_t *first, int64_t *lasts
) {
    struct threshold *all = calloc((size_t)numbers + 1, sizeof *all);
    if (!all) return -1;
    int left = 0;
    for (int i = 0; i < SPARE; i++) all[i].value = UINT32_MAX;
    for (int k = 0; k < count; k++) left += rooms[k] > come[k];
    for (int i = SPARE; i < numbers; i++) {
        struct threshold *t = all + i;
        t->k = first[i];
        t->value = values[t->k];
        t->come = (uint32_t)come[t->k];
        while (t->k < count && values[t->k] == t->value && rooms[t->k] <= come[t->k]) t->k++;
        t->next = t->k < count && values[t->k] == t->value ? (uint32_t)rooms[t->k] : 0;
    }
    uint32_t bits[BLOCK];
    for (int64_t at = from; at < to && left; at += BLOCK) {
        const int n = block_at(at, to);
        magnitudes(bits, base, base_type, x, type, at, n);
        for (int j = 0; j < n; j++) {
            const uint32_t bucket = bits[j] >> LOW_BITS;
            int i = wanted[bucket];
            if (i >= alone)
                while (all[i].value > bits[j] && all[i + 1].value >> LOW_BITS == bucket) i++;
            struct threshold *t = all + (all[i].value == bits[j] ? i : j & (SPARE - 1));
            if (++t->come != t->next) continue;
            lasts[t->k++] = at + j;
            left--;
            t->next = t->k < count && values[t->k] == t->value ? (uint32_t)rooms[t->k] : 0;
        }
    }
    free(all);
    return 0;
}

/* For the distinct thresholds values[count], descending: adds to sums[i] floor(unit * magnitude) of every
   element x with values[i - 1] >= x > values[i], to counts[i] how many there are. numbers: see
   `number_buckets`; sums, counts: [count + 1]. */
int sums_between(
    int64_t from, int64_t to, const void *base, int base_type, const void *x, int type, float unit, int count,
    const uint32_t *values, const uint16_t *numbers, double *sums, int64_t *counts
) {
    uint32_t bits[BLOCK];
    float whole[BLOCK];
    for (int64_t at = from; at < to; at += BLOCK) {
        const int n = block_at(at, to);
        magnitudes(bits, base, base_type, x, type, at, n);
        for (int j = 0; j < n; j++) whole[j] = floorf(value_of(bits[j]) * unit);
        for (int j = 0; j < n; j++) {
            int i = numbers[bits[j] >> LOW_BITS];
            while (i < count && values[i] >= bits[j]) i++;
            sums[i] += whole[j];
            counts[i]++;
        }
    }
    return 0;
}

/* numbers[BUCKETS]: for each bucket how many of the distinct thresholds values[count], descending, are in
   buckets above it. */
int number_buckets(int count, const uint32_t *values, uint16_t *numbers) {
    int i = 0;
    for (int bucket = BUCKETS - 1; bucket >= 0; bucket--) {
        while (i < count && (int)(values[i] >> LOW_BITS) > bucket) i++;
        numbers[bucket] = (uint16_t)i;
    }
    return 0;
}

/* sums[grid]: adds floor(|x - base| * unit) of every element to the entry of its hash: the share of all
   32-bit numbers below it, times `grid`, rounded down. */
int hash_sums(
    int64_t from, int64_t to, const void *base, int base_type, const void *x, int type, int32_t key,
    int32_t odd, float unit, int grid, double *sums
) {
    float b[BLOCK], d[BLOCK];
    uint32_t h[BLOCK];
    for (int64_t at = from; at < to; at += BLOCK) {
        const int n = to - at < BLOCK ? (int)(to - at) : BLOCK;
        load(b, base, base_type, at, n);
        load(d, x, type, at, n);
        difference(d, b, n);
        indices(h, at, n);
        for (int j = 0; j < n; j++) {
            const uint32_t hash = ((h[j] ^ (uint32_t)key) * (uint32_t)odd) ^ 0x80000000u;
            h[j] = (uint32_t)(((uint64_t)hash * (uint32_t)grid) >> 32);
            d[j] = floorf(fabsf(d[j]) * unit);
        }
        for (int j = 0; j < n; j++) sums[h[j]] += d[j];
    }
    return 0;
}

/* Replaces counts[n] by their sums up to each. */
static inline void to_places(uint32_t *counts, int n) {
    uint32_t place = 0;
    for (int v = 0; v < n; v++) {
        const uint32_t here = counts[v];
        counts[v] = place;
        place += here;
    }
}

static inline int width_of(uint32_t x) { return x ? 32 - __builtin_clz(x) : 0; }

/* keys[n]: numbers in the order of bits[n], as few bits as can be: without zeros that all end in, and without
   what no bits lie between 0 and the smallest. Returns the largest. */
static uint32_t shorten(uint32_t *restrict bits, int n) {
    uint32_t any = 0, least = UINT32_MAX, most = 0;
    for (int j = 0; j < n; j++) {
        const uint32_t here = bits[j] - 1; /* 0 becomes the largest */
        any |= bits[j];
        least = here < least ? here : least;
        most = bits[j] > most ? bits[j] : most;
    }
    if (!any) return 0;
    const int zeros = __builtin_ctz(any);
    const uint32_t lowest = ((least + 1) >> zeros) - 1;
    for (int j = 0; j < n; j++) bits[j] = bits[j] ? (bits[j] >> zeros) - lowest : 0;
    return (most >> zeros) - lowest;
}

/* Ranks of keys[n] of at most 22 bits, equal ones in order: two digits. order: [n]; counts: [2][2048]. */
static void rank_short(
    const uint32_t *restrict keys, int n, int width, uint16_t *restrict ranks, uint32_t *restrict order,
    uint32_t *restrict counts
) {
    const int digit = (width + 1) / 2, values = 1 << digit;
    uint32_t *restrict low = counts, *restrict high = counts + 2048;
    memset(low, 0, (size_t)values * 4);
    memset(high, 0, (size_t)values * 4);
    for (int j = 0; j < n; j++) {
        low[keys[j] & (uint32_t)(values - 1)]++;
        high[keys[j] >> digit]++;
    }
    to_places(low, values);
    to_places(high, values);
    for (int j = 0; j < n; j++)
        order[low[keys[j] & (uint32_t)(values - 1)]++] = keys[j] >> digit << 16 | (uint32_t)j;
    for (int j = 0; j < n; j++) ranks[order[j] & 0xffff] = (uint16_t)high[order[j] >> 16]++;
}

/* The same for keys of up to 32 bits: three digits. order: [2][n]; counts: [3][2048]. */
static void rank_long(
    const uint32_t *restrict keys, int n, int width, uint16_t *restrict ranks, uint64_t *restrict order,
    uint32_t *restrict counts
) {
    const int digit = (width + 2) / 3, values = 1 << digit;
    const uint32_t mask = (uint32_t)values - 1;
    uint32_t *restrict low = counts, *restrict middle = counts + 2048, *restrict high = counts + 4096;
    uint64_t *restrict other = order + n;
    for (int i = 0; i < 3; i++) memset(counts + i * 2048, 0, (size_t)values * 4);
    for (int j = 0; j < n; j++) {
        low[keys[j] & mask]++;
        middle[(keys[j] >> digit) & mask]++;
        high[keys[j] >> 2 * digit]++;
    }
    to_places(low, values);
    to_places(middle, values);
    to_places(high, values);
    for (int j = 0; j < n; j++)
        order[low[keys[j] & mask]++] = (uint64_t)(keys[j] >> digit) << 16 | (uint64_t)j;
    for (int j = 0; j < n; j++) other[middle[(order[j] >> 16) & mask]++] = order[j];
    for (int j = 0; j < n; j++) ranks[other[j] & 0xffff] = (uint16_t)high[other[j] >> (16 + digit)]++;
}

/* Ranks of bits[n], n < 65536, equal ones in order, by one count: magnitudes are multiplied by a power of two
   that leaves few whole numbers; an element's key is twice the whole part, one more if there is a fraction.
   Elements of an even key are equal; those of odd keys are listed and sorted. most: the largest of bits.
   Returns 0, with nothing done, where more than one of eight is listed or no such power is a number.
   keys: [n]; list: [n + 1]; counts: [COUNTED]. */
enum { COUNTED = 1 << 14 };

static int rank_by_count(
    const uint32_t *restrict bits, int n, uint32_t most, uint16_t *restrict ranks, uint16_t *restrict keys,
    uint64_t *restrict list, uint16_t *restrict counts
) {
    if (!most) {
        for (int j = 0; j < n; j++) ranks[j] = (uint16_t)j;
        return 1;
    }
    const int exponent = (int)(most >> 23) - 127, power = (n < 2048 ? 10 : 12) - exponent;
    if (exponent == 128 || power < -126 || power > 127) return 0;
    const float unit = value_of((uint32_t)(power + 127) << 23);
    const int values = 2 * (int)(value_of(most) * unit) + 2, groups = (values + 15) / 16;
    int listed = 0;
    for (int j = 0; j < n; j++) {
        const float scaled = value_of(bits[j]) * unit;
        const int32_t whole = (int32_t)scaled;
        keys[j] = (uint16_t)(2 * whole + ((float)whole != scaled));
    }
    memset(counts, 0, (size_t)groups * 32);
    const int quarter = n / 4, rest = n - n % 4;
    const uint16_t *second = keys + quarter, *third = second + quarter, *fourth = third + quarter;
    for (int j = 0; j < quarter; j++) { /* neighbours are often equal, and would wait */
        counts[keys[j]]++;
        counts[second[j]]++;
        counts[third[j]]++;
        counts[fourth[j]]++;
    }
    for (int j = rest; j < n; j++) counts[keys[j]]++;
    for (int j = 0; j < rest; j += 4) {
        uint64_t odd;
        memcpy(&odd, keys + j, 8);
        for (odd &= 0x0001000100010001u; odd; odd &= odd - 1)
            list[listed++] = (uint64_t)(j + __builtin_ctzll(odd) / 16);
    }
    for (int j = rest; j < n; j++)
        if (keys[j] & 1) list[listed++] = (uint64_t)j;
    if (listed > n / 8) return 0;
    uint64_t place = 0; /* four counts at a time: a product with these ones sums those up to each */
    const uint64_t ones = 0x0001000100010001u;
    for (int group = 0; group < groups; group++) {
        uint64_t words[4];
        memcpy(words, counts + 16 * group, 32);
        if (!(words[0] | words[1] | words[2] | words[3])) continue;
        for (int w = 0; w < 4; w++) {
            const uint64_t up_to = words[w] * ones;
            words[w] = (up_to << 16) + place * ones;
            place += up_to >> 48;
        }
        memcpy(counts + 16 * group, words, 32);
    }
    for (int j = 0; j < n; j++) ranks[j] = counts[keys[j]]++;
    for (int i = 0; i < listed; i++) list[i] |= (uint64_t)bits[list[i]] << 32;
    for (int gap = listed / 2; gap; gap /= 2)
        for (int i = gap; i < listed; i++) {
            const uint64_t here = list[i];
            int j = i;
            for (; j >= gap && list[j - gap] > here; j -= gap) list[j] = list[j - gap];
            list[j] = here;
        }
    for (int i = 0; i < listed;) { /* of a key that is listed, counts holds the rank after the last */
        const uint16_t key = keys[list[i] & 0xffff];
        int end = i;
        while (end < listed && keys[list[end] & 0xffff] == key) end++;
        for (int j = i; j < end; j++) ranks[list[j] & 0xffff] = (uint16_t)(counts[key] - (end - j));
        i = end;
    }
    return 1;
}

/* Asks for large pages of a buffer about to be written: its first touches cost more than the ranks. */
int use_large_pages(void *buffer, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = 1 << 21, first = ((uintptr_t)buffer + page - 1) / page * page;
    const uintptr_t last = ((uintptr_t)buffer + (uintptr_t)bytes) / page * page;
    if (last > first) madvise((void *)first, last - first, MADV_HUGEPAGE);
#else
    (void)buffer, (void)bytes;
#endif
    return 0;
}

/* Ranks of |x - base| within rows of `width` <= 65536 elements, ascending, equal ones in order. from, to:
   multiples of width. top: bits of the largest magnitude; raised, never lowered. Returns -1 without
   memory. */
int rank_rows(
    int64_t from, int64_t to, int64_t width, const void *base, int base_type, const void *x, int type,
    uint16_t *ranks, uint32_t *top
) {
    enum { AGAIN = 16 }; /* rows after which counting is tried again where it did not do */
    uint32_t *bits = malloc((size_t)width * 4), *counts = malloc(COUNTED * 4);
    uint16_t *keys = malloc((size_t)width * 2);
    uint64_t *order = malloc((size_t)width * 16 + 8);
    int status = -1, skip = width < 65536 ? 0 : -1;
    if (!bits || !keys || !counts || !order) goto done;
    for (int64_t row = from; row < to; row += width) {
        for (int64_t at = row; at < row + width; at += BLOCK)
            magnitudes(bits + (at - row), base, base_type, x, type, at, block_at(at, row + width));
        uint32_t most = 0;
        for (int64_t j = 0; j < width; j++) most = bits[j] > most ? bits[j] : most;
        *top = most > *top ? most : *top;
        if (skip > 0) {
            skip--;
        } else if (skip == 0) {
            if (rank_by_count(bits, (int)width, most, ranks + row, keys, order, (uint16_t *)counts)) continue;
            skip = AGAIN;
        }
        const int few = width_of(shorten(bits, (int)width));
        if (few <= 22)
            rank_short(bits, (int)width, few, ranks + row, (uint32_t *)order, counts);
        else
            rank_long(bits, (int)width, few, ranks + row, order, counts);
    }
    status = 0;
done:
    free(bits);
    free(keys);
    free(counts);
    free(order);
    return status;
}
