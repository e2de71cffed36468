// Products of small blocks, and the orders of rows that they read.
//
// A unit is what one step of a product reads of a row: a float, or two bf16 where the CPU multiplies such pairs;
// elsewhere bf16 tensors are computed in fp32. Sums are fp32.

#pragma once

#include <memory>

#include "vectors.h"

namespace {

constexpr int SUMS = LANES;  // vectors of sums that a tile of a product keeps in registers
constexpr int64_t ROWS = 8;  // the rows of a product are a multiple of this
constexpr int64_t COLUMNS = 2 * LANES;  // columns that a tile takes; the last may take LANES

INLINE int64_t up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
INLINE int64_t down(int64_t x, int64_t to) { return x / to * to; }

template <class T> struct Memory {
    std::unique_ptr<T[]> owned;
    explicit Memory(int64_t count) : owned(new T[count]) {}
    operator T*() const { return owned.get(); }
};

struct Single {
    typedef float Unit;
    typedef float Element;
    static constexpr int64_t WIDTH = 1;
    template <class T> static INLINE Element element(T x) { return widen(x); }
    template <class T> static INLINE Unit unit(const T* x) { return widen(*x); }
    template <class T> static INLINE Floats units(const T* x) { return load(x); }  // LANES of them
    static INLINE Floats add(Floats sum, Unit a, Floats b) { return sum + a * b; }
    static INLINE Floats neighbours(Floats x, Floats) { return x; }
    template <class T> static INLINE Floats neighbours(const T* x, const T*) { return load(x); }
};

#ifdef __AVX512BF16__
// Places of {a0, b0, a1, b1, ...} in 16 halves a and 16 halves b behind them.
struct Woven {
    uint16_t of[2 * LANES];
    constexpr Woven() : of() {
        for (int i = 0; i < 2 * LANES; i++) of[i] = i / 2 + i % 2 * LANES;
    }
};
constexpr Woven WOVEN;

struct Pair {
    typedef uint32_t Unit;
    typedef bf16 Element;
    static constexpr int64_t WIDTH = 2;
    static INLINE Element element(bf16 x) { return x; }
    static INLINE Element element(float x) {
        bf16 y;
        narrow(x, &y);
        return y;
    }
    template <class T> static INLINE Unit unit(const T* x) {
        return uint32_t(element(x[0])) | uint32_t(element(x[1])) << 16;
    }
    static INLINE Floats units(const bf16* x) { return load((const float*)x); }
    static INLINE Floats units(const float* x) {
        return (Floats)_mm512_cvtne2ps_pbh((__m512)load(x + LANES), (__m512)load(x));
    }
    static INLINE Floats add(Floats sum, Unit a, Floats b) {
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
    }
    // Units of x's elements and next's, side by side.
    static INLINE Floats neighbours(Floats x, Floats next) {
        auto both = (__m512i)_mm512_cvtne2ps_pbh((__m512)next, (__m512)x);
        return (Floats)_mm512_permutexvar_epi16(_mm512_loadu_si512(&WOVEN), both);
    }
    static INLINE Floats neighbours(const bf16* x, const bf16* next) {
        __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x));
        __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)next));
        return (Floats)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    }
    static INLINE Floats neighbours(const float* x, const float* next) { return neighbours(load(x), load(next)); }
};
typedef Pair Bfloat16;
#else
typedef Single Bfloat16;
#endif

template <class T> struct UnitsOf { typedef Bfloat16 Units; };
template <> struct UnitsOf<float> { typedef Single Units; };

// c (rows, columns) = a (rows, depth) b (depth, columns), or that added to c; a and b in units. ACROSS: a is stored as
// (depth, rows).

template <class U, bool ACROSS, int HEIGHT, int COLS>
INLINE void tile(const typename U::Unit* a, int64_t step_a, const typename U::Unit* b, int64_t step_b, float* c,
                 int64_t step_c, int64_t depth, bool add) {
    Floats sums[HEIGHT][COLS];
#pragma GCC unroll 16
    for (int i = 0; i < HEIGHT; i++)
#pragma GCC unroll 2
        for (int j = 0; j < COLS; j++) sums[i][j] = add ? load(c + i * step_c + j * LANES) : Floats{};
    for (int64_t k = 0; k < depth; k++) {
        Floats parts[COLS];
#pragma GCC unroll 2
        for (int j = 0; j < COLS; j++) parts[j] = load((const float*)(b + k * step_b + j * LANES));
#pragma GCC unroll 16
        for (int i = 0; i < HEIGHT; i++)
#pragma GCC unroll 2
            for (int j = 0; j < COLS; j++)
                sums[i][j] = U::add(sums[i][j], a[ACROSS ? k * step_a + i : i * step_a + k], parts[j]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < HEIGHT; i++)
#pragma GCC unroll 2
        for (int j = 0; j < COLS; j++) store(c + i * step_c + j * LANES, sums[i][j]);
}

template <class U, bool ACROSS, int COLS>
INLINE void stripe(int64_t rows, const typename U::Unit* a, int64_t step_a, const typename U::Unit* b, int64_t step_b,
                   float* c, int64_t step_c, int64_t depth, bool add) {
    constexpr int HEIGHT = std::min<int>(ROWS, SUMS / COLS);
    for (int64_t i = 0; i < rows; i += HEIGHT)
        tile<U, ACROSS, HEIGHT, COLS>(a + (ACROSS ? i : i * step_a), step_a, b, step_b, c + i * step_c, step_c, depth,
                                      add);
}

template <class U, bool ACROSS = false>
void product(int64_t rows, int64_t columns, const typename U::Unit* a, int64_t step_a, const typename U::Unit* b,
             int64_t step_b, float* c, int64_t step_c, int64_t depth, bool add) {
    int64_t j = 0;
    for (; j + COLUMNS <= columns; j += COLUMNS)
        stripe<U, ACROSS, 2>(rows, a, step_a, b + j, step_b, c + j, step_c, depth, add);
    if (j < columns) stripe<U, ACROSS, 1>(rows, a, step_a, b + j, step_b, c + j, step_c, depth, add);
}

// Copies of rows x (T, C) in the orders that products read: rows from `count` to `padded` are zeros; `padded` and
// `size` are multiples of LANES.

// A row's units hold its neighbouring channels: (T, C).
template <class U, class T>
void pack_rows(const T* x, int64_t step, int64_t count, int64_t padded, int64_t size, typename U::Unit* out) {
    auto to = (typename U::Element*)out;
    for (int64_t t = 0; t < count; t++)
        for (int64_t c = 0; c < size; c++) to[t * size + c] = U::element(x[t * step + c]);
    std::fill(to + count * size, to + padded * size, 0);
}

// The same units transposed within blocks of COLUMNS rows: (blocks, C, COLUMNS).
template <class U, class T>
void pack_rows_across(const T* x, int64_t step, int64_t count, int64_t padded, int64_t size, typename U::Unit* out) {
    constexpr int64_t W = U::WIDTH;
    const int64_t units = size / W;
    for (int64_t t0 = 0; t0 < padded; t0 += LANES) {
        typename U::Unit* columns = out + t0 / COLUMNS * units * COLUMNS + t0 % COLUMNS;
        int64_t c = 0;
        if (t0 + LANES <= count)
            for (; c + LANES <= units; c += LANES)
                transposed([&](auto i) INLINED { return U::units(x + (t0 + i) * step + c * W); },
                           [&](auto i, Floats v) INLINED { store((float*)columns + (c + i) * COLUMNS, v); });
        for (; c < units; c++)
            for (int64_t i = 0; i < LANES; i++)
                columns[c * COLUMNS + i] = t0 + i < count ? U::unit(x + (t0 + i) * step + c * W) : 0;
    }
}

// And back: y (T, C), up to COLUMNS rows, from sums (C, COLUMNS), a row times its factor.
template <class T>
void unpack_across(const float* sums, const float* factors, int64_t count, int64_t size, T* y, int64_t step) {
    for (int64_t t0 = 0; t0 < count; t0 += LANES)
        for (int64_t c = 0; c < size; c += LANES)
            transposed([&](auto i) INLINED { return load(sums + (c + i) * COLUMNS + t0) * load(factors + t0); },
                       [&](auto i, Floats v) INLINED { if (t0 + i < count) store(y + (t0 + i) * step + c, v); });
}

// A channel's units hold neighbouring rows: (T, C).
template <class U, class T>
void pack_channels(const T* x, int64_t step, int64_t count, int64_t padded, int64_t size, typename U::Unit* out) {
    constexpr int64_t W = U::WIDTH;
    auto to = (typename U::Element*)out;
    for (int64_t t = 0; t < padded; t += W)
        if (t + W <= count) {
            const T *row = x + t * step, *next = row + (W - 1) * step;
            for (int64_t c = 0; c < size; c++) {
                to[t * size + c * W] = U::element(row[c]);
                to[t * size + c * W + W - 1] = U::element(next[c]);
            }
        } else
            for (int64_t c = 0; c < size; c++)
                for (int64_t w = 0; w < W; w++)
                    to[t * size + c * W + w] =
                        t + w < count ? U::element(x[(t + w) * step + c]) : typename U::Element(0);
}

// The same units in panels of COLUMNS channels: (panels, T, COLUMNS), T rounded up to whole units.
template <class U, class T>
void pack_panels(const T* x, int64_t step, int64_t count, int64_t size, typename U::Unit* out) {
    constexpr int64_t W = U::WIDTH, AHEAD = 8;
    const int64_t panel = up(count, W) / W * COLUMNS;
    const T zeros[LANES] = {};
    for (int64_t t = 0; t < count; t += W)
        for (int64_t c = 0; c < size; c += LANES) {
            const T *row = x + t * step + c, *next = t + W > count ? zeros : row + (W - 1) * step;
            for (int64_t w = 0; w < W; w++) fetch(row + (AHEAD + w) * step, LANES);
            store((float*)(out + c / COLUMNS * panel + t / W * COLUMNS + c % COLUMNS), U::neighbours(row, next));
        }
}

}  // namespace
