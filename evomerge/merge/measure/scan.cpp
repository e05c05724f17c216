// Passes over whole tensors, for `scan.py`: counts of magnitudes, ranks in rows, sums, dot products.
//
// magnitudes.py, ranks.py, sums.py and gram.py say what they mean and compute the same in torch, with the same bits: no
// multiplication here may be fused with an addition, and every sum has the order given there.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace {

enum Type { FLOAT32, BFLOAT16, FLOAT16 };

constexpr int64_t BLOCK = 1024;    // elements that are widened at once, for a core's first cache
constexpr int64_t BINS = 1 << 15;  // of the upper 16 bits of a float32 without its sign
constexpr int TABLES = 4;          // counters used in turn: equal numbers are often neighbours, and an increment
                                   // must wait for the last one of the same counter
constexpr int ROWS = 4;            // rows that are ranked side by side, for the same reason

float of_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

// The elements start .. start + size - 1 as float32.
void widen(float* __restrict to, const void* from, int type, int64_t start, int64_t size) {
    if (type == FLOAT32) {
        std::memcpy(to, static_cast<const float*>(from) + start, size * sizeof(float));
        return;
    }
    const uint16_t* __restrict x = static_cast<const uint16_t*>(from) + start;
    if (type == BFLOAT16) {
        for (int64_t i = 0; i < size; ++i) to[i] = of_bits(uint32_t(x[i]) << 16);
        return;
    }
    for (int64_t i = 0; i < size; ++i) {
        const uint32_t magnitude = uint32_t(x[i] & 0x7fff) << 13;
        const uint32_t wide = bits_of(of_bits(magnitude) * 0x1p112f) | (magnitude >= 0x0f800000 ? 0x7f800000 : 0);
        to[i] = of_bits(wide | uint32_t(x[i] & 0x8000) << 16);
    }
}

// The bits of |source - base| as float32.
void sizes(uint32_t* __restrict to, const void* base, int base_type, const void* source, int source_type,
           int64_t start, int64_t size) {
    float b[BLOCK], x[BLOCK];
    widen(b, base, base_type, start, size);
    widen(x, source, source_type, start, size);
    for (int64_t i = 0; i < size; ++i) to[i] = bits_of(x[i] - b[i]) & 0x7fffffff;
}

// The sum by halving; it overwrites the lanes.
double total(double* lanes, int64_t size) {
    while (size > 1) {
        const int64_t half = size / 2;
        for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[size - half + i];
        size -= half;
    }
    return lanes[0];
}

// The upper 16 bits of the magnitudes, shifted so that the lowest that is not 0 becomes 1; 0 stays 0.  Returns the
// highest plus one.
int64_t load_keys(uint16_t* __restrict keys, const void* base, int base_type, const void* source, int source_type,
                  int64_t start, int64_t size) {
    uint32_t bits[BLOCK];
    uint16_t highest = 0, below = 0xffff;
    for (int64_t i = 0; i < size; i += BLOCK) {
        const int64_t part = std::min(BLOCK, size - i);
        sizes(bits, base, base_type, source, source_type, start + i, part);
        for (int64_t k = 0; k < part; ++k) {
            const uint16_t key = uint16_t(bits[k] >> 16);
            keys[i + k] = key;
            highest = std::max(highest, key);
            below = std::min<uint16_t>(below, key - 1);
        }
    }
    if (!highest) return 1;
    for (int64_t i = 0; i < size; ++i) keys[i] = keys[i] ? keys[i] - below : 0;
    return highest - below + 1;
}

// The levels of COUNT rows of n keys below `bins`.  Equal keys keep the order of their columns.
template <int COUNT>
void rank_by_counting(uint8_t* __restrict levels, const uint16_t* __restrict keys, int64_t n, int64_t bins,
                      const uint8_t* __restrict level_of, uint32_t* __restrict table) {
    std::fill(table, table + bins * COUNT, 0);  // (bins, COUNT): how many in a row have a key, then how many come before
    for (int64_t i = 0; i < n; ++i)
        for (int r = 0; r < COUNT; ++r) ++table[keys[r * n + i] * COUNT + r];
    uint32_t before[COUNT] = {};
    for (int64_t b = 0; b < bins; ++b)
        for (int r = 0; r < COUNT; ++r) before[r] += std::exchange(table[b * COUNT + r], before[r]);
    for (int64_t i = 0; i < n; ++i)
        for (int r = 0; r < COUNT; ++r) levels[r * n + i] = level_of[table[keys[r * n + i] * COUNT + r]++];
}

}  // namespace

extern "C" {

// Count |source - base| by the upper 16 bits, and store those whose lower bits are not 0 while they are few.
// counts: BINS zeros.  odd: memory for 1024 + elements / 16 + chunk.  Returns how many were stored, -1 if not few.
int64_t count_sizes(const void* base, int base_type, const void* source, int source_type, int64_t elements,
                    int64_t chunk, int64_t* counts, uint32_t* odd) {
    std::vector<uint32_t> tables(TABLES * BINS);
    uint32_t* __restrict table = tables.data();  // (BINS, TABLES)
    uint32_t bits[BLOCK];
    int64_t found = 0;
    for (int64_t first = 0; first < elements; first += chunk) {
        const int64_t stop = std::min(first + chunk, elements);
        for (int64_t start = first; start < stop; start += BLOCK) {
            const int64_t size = std::min(BLOCK, stop - start);
            sizes(bits, base, base_type, source, source_type, start, size);
            int64_t counted = 0;
            for (; counted + TABLES <= size; counted += TABLES)
                for (int t = 0; t < TABLES; ++t) ++table[(bits[counted + t] >> 16) * TABLES + t];
            for (; counted < size; ++counted) ++table[(bits[counted] >> 16) * TABLES];
            if (found < 0) continue;
            for (int64_t i = 0; i < size; ++i) {
                odd[found] = bits[i];
                found += (bits[i] & 0xffff) != 0;
            }
        }
        if (found > 1024 + stop / 16) found = -1;
        if ((first / chunk) % 1024 == 1023 || stop == elements) {  // before 32 bits are full
            for (int64_t i = 0; i < TABLES * BINS; ++i) counts[i / TABLES] += table[i];
            std::fill(tables.begin(), tables.end(), 0);
        }
    }
    return found;
}

// floor(256 rank / n) of every |source - base| in its row, by the upper 16 bits.
void rank_levels(const void* base, int base_type, const void* source, int source_type, int64_t rows, int64_t n,
                 uint8_t* levels) {
    std::vector<uint8_t> level_of(n);
    for (int64_t rank = 0; rank < n; ++rank) level_of[rank] = uint8_t(rank * 256 / n);
    std::vector<uint16_t> keys(std::min<int64_t>(ROWS, rows) * n);
    std::vector<uint32_t> table(ROWS * BINS);
    int64_t row = 0;
    for (; row + ROWS <= rows; row += ROWS) {
        const int64_t bins = load_keys(keys.data(), base, base_type, source, source_type, row * n, ROWS * n);
        rank_by_counting<ROWS>(levels + row * n, keys.data(), n, bins, level_of.data(), table.data());
    }
    for (; row < rows; ++row) {
        const int64_t bins = load_keys(keys.data(), base, base_type, source, source_type, row * n, n);
        rank_by_counting<1>(levels + row * n, keys.data(), n, bins, level_of.data(), table.data());
    }
}

// The sums of |source - base| and, if there are levels, of |source - base| * (level + 1/2) / 256.  sums: two zeros.
void sum_sizes(const void* base, int base_type, const void* source, int source_type, const uint8_t* levels,
               int64_t elements, int64_t lanes, int64_t segment, double* sums) {
    lanes = std::min(lanes, elements);
    std::vector<double> partial(2 * lanes);
    double *plain = partial.data(), *weighted = plain + lanes;
    uint32_t bits[BLOCK];
    for (int64_t first = 0; first < elements; first += segment) {
        const int64_t stop = std::min(first + segment, elements), width = std::min(lanes, stop - first);
        std::fill(partial.begin(), partial.end(), 0.0);
        for (int64_t lane = 0; lane < width; lane += BLOCK) {
            for (int64_t start = first + lane; start < stop; start += width) {
                const int64_t size = std::min({BLOCK, width - lane, stop - start});
                sizes(bits, base, base_type, source, source_type, start, size);
                for (int64_t i = 0; i < size; ++i) plain[lane + i] += of_bits(bits[i]);
                if (!levels) continue;
                const uint8_t* level = levels + start;
                for (int64_t i = 0; i < size; ++i) weighted[lane + i] += of_bits(bits[i]) * ((level[i] + 0.5) / 256);
            }
        }
        sums[0] += total(plain, width);
        sums[1] += total(weighted, width);
    }
}

// The dot products of `count` tensors, less `origin` if there is one.  gram: (count, count).
void gram_matrix(int64_t count, const void* const* tensors, const int* types, const void* origin, int origin_type,
                 int64_t elements, int64_t lanes, int64_t segment, double* gram) {
    const int64_t pairs = count * (count + 1) / 2;
    lanes = std::min(lanes, elements);
    std::vector<double> partial(pairs * lanes), wide(count * BLOCK), shift(BLOCK), sums(pairs);
    float narrow[BLOCK];
    const auto load = [&](double* __restrict to, const void* from, int type, int64_t start, int64_t size) {
        widen(narrow, from, type, start, size);
        for (int64_t i = 0; i < size; ++i) to[i] = narrow[i];
    };
    for (int64_t first = 0; first < elements; first += segment) {
        const int64_t stop = std::min(first + segment, elements), width = std::min(lanes, stop - first);
        std::fill(partial.begin(), partial.end(), 0.0);
        for (int64_t lane = 0; lane < width; lane += BLOCK) {
            for (int64_t start = first + lane; start < stop; start += width) {
                const int64_t size = std::min({BLOCK, width - lane, stop - start});
                if (origin) load(shift.data(), origin, origin_type, start, size);
                for (int64_t i = 0; i < count; ++i) {
                    double* __restrict x = &wide[i * BLOCK];
                    load(x, tensors[i], types[i], start, size);
                    if (origin)
                        for (int64_t k = 0; k < size; ++k) x[k] -= shift[k];
                }
                double* sum = &partial[lane];
                for (int64_t i = 0; i < count; ++i) {
                    for (int64_t j = i; j < count; ++j, sum += lanes) {
                        const double *x = &wide[i * BLOCK], *y = &wide[j * BLOCK];
                        double* __restrict to = sum;
                        for (int64_t k = 0; k < size; ++k) to[k] += x[k] * y[k];
                    }
                }
            }
        }
        for (int64_t p = 0; p < pairs; ++p) sums[p] += total(&partial[p * lanes], width);
    }
    for (int64_t i = 0, p = 0; i < count; ++i)
        for (int64_t j = i; j < count; ++j, ++p) gram[i * count + j] = gram[j * count + i] = sums[p];
}

}  // extern "C"
