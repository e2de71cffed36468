// Vectors of floats for the compiled kernels: 16 with AVX-512, else 8; read from fp32, bf16 and int8.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline))  // of a lambda

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef uint16_t bf16;
typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));

// Ask for what is read or written soon: memory answers while products run.
template <class T> INLINE void fetch(const T* from, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(from + i, 0, 2);
}
template <class T> INLINE void fetch_to_write(T* to, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(to + i, 1);
}

// Calls f with the constants 0 to COUNT - 1, so that arrays which it indexes with them are kept in registers.
template <int COUNT, class F> INLINE void unrolled(F f) {
    [&]<int... I>(std::integer_sequence<int, I...>) INLINED { (f(std::integral_constant<int, I>{}), ...); }
    (std::make_integer_sequence<int, COUNT>{});
}

INLINE Floats load(const float* p) {
    Floats v;
    memcpy(&v, p, sizeof v);
    return v;
}

#ifdef __AVX512F__  // what follows, but in one instruction a step, which GCC 12 does not find
INLINE Floats load(const bf16* p) {
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}

INLINE Floats load(const int8_t* p) {
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
#else
INLINE Floats load(const bf16* p) {
    Halves v;
    memcpy(&v, p, sizeof v);
    return (Floats)(__builtin_convertvector(v, Words) << 16);
}

INLINE Floats load(const int8_t* p) {
    Bytes v;
    memcpy(&v, p, sizeof v);
    return __builtin_convertvector(__builtin_convertvector(v, Ints), Floats);
}
#endif

INLINE Floats spread(float x) { return x - Floats{}; }  // x + 0 would be computed, for the sake of -0

// a * b + c in one rounding where the CPU can: left to the compiler, that depends on how many sums stand beside.
INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

template <class T> INLINE Floats load_some(const T* p, int64_t count) {
    T padded[LANES] = {};
    memcpy(padded, p, count * sizeof(T));
    return load(padded);
}

struct Places {
    int32_t of[LANES];
};

// Places of {a0, b0, a1, b1, ...} in a vector a and a vector b behind it, a first place later.
constexpr Places interleaved(int first) {
    Places places{};
    for (int i = 0; i < LANES; i++) places.of[i] = first + i / 2 + i % 2 * LANES;
    return places;
}

constexpr Places rotated(int by) {
    Places places{};
    for (int i = 0; i < LANES; i++) places.of[i] = (i + by) % LANES;
    return places;
}

INLINE Ints as_vector(const Places& places) {
    Ints v;
    memcpy(&v, &places, sizeof v);
    return v;
}

// Of a and b in turn, each element plus the one half a vector behind it.
INLINE Floats fold(Floats a, Floats b) {
    static constexpr Places low = interleaved(0), high = interleaved(LANES / 2);
    return __builtin_shuffle(a, b, as_vector(low)) + __builtin_shuffle(a, b, as_vector(high));
}

// Vector i of LANES vectors trades its element j for element i of vector j.
template <int DONE = 1> INLINE void transpose(Floats* v) {
    if constexpr (DONE < LANES) {
        static constexpr Places low = interleaved(0), high = interleaved(LANES / 2);
        Floats next[LANES];
        unrolled<LANES / 2>([&](auto i) INLINED {
            next[2 * i] = __builtin_shuffle(v[i], v[i + LANES / 2], as_vector(low));
            next[2 * i + 1] = __builtin_shuffle(v[i], v[i + LANES / 2], as_vector(high));
        });
        transpose<2 * DONE>(next);
        unrolled<LANES>([&](auto i) INLINED { v[i] = next[i]; });
    }
}

// Transposes a block: element j of the vector `get(i)` becomes element i of the vector that `put(j, v)` takes.
template <class Get, class Put> INLINE void transposed(Get get, Put put) {
    Floats v[LANES];
    unrolled<LANES>([&](auto i) INLINED { v[i] = get(i); });
    transpose(v);
    unrolled<LANES>([&](auto i) INLINED { put(i, v[i]); });
}

// Combines elements that are SHIFT apart, then SHIFT / 2, down to LEAST.
template <int SHIFT, int LEAST, class F> INLINE Floats combine(Floats v, F with) {
    if constexpr (SHIFT >= LEAST && SHIFT > 0) {
        static constexpr Places behind = rotated(SHIFT);
        return combine<SHIFT / 2, LEAST>(with(v, Floats(__builtin_shuffle(v, as_vector(behind)))), with);
    }
    return v;
}

// The sum of the elements of each of COUNT vectors (a power of two, at most LANES) is left in v[0], one behind the
// other. The order of additions within a vector is the same whatever COUNT is.
template <int COUNT, int LEFT = COUNT> INLINE void sum(Floats* v) {
    if constexpr (LEFT > 1) {
        constexpr int HALF = LEFT / 2;
        unrolled<HALF>([&](auto i) INLINED { v[i] = fold(v[i], v[i + HALF]); });
        sum<COUNT, HALF>(v);
    } else {
        v[0] = combine<LANES / 2, COUNT>(v[0], [](Floats a, Floats b) { return a + b; });
    }
}

INLINE float total(Floats v) {
    sum<1>(&v);
    return v[0];
}

// Of rows whose size is a multiple of LANES: calls f with the place of each vector.
template <class F> INLINE void each(int64_t size, F f) {
    for (int64_t i = 0; i < size; i += LANES) f(i);
}

template <class T, class S> INLINE float dot(const T* a, const S* b, int64_t size) {
    Floats sums = {};
    each(size, [&](int64_t i) { sums += load(a + i) * load(b + i); });
    return total(sums);
}

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
inline float widen(int8_t x) { return x; }

inline void narrow(float x, float* y) { *y = x; }
inline void narrow(float x, bf16* y) {  // to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    memcpy(&bits, &x, 4);
    *y = x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}

INLINE void store(float* p, Floats v) { memcpy(p, &v, sizeof v); }

#ifdef __AVX512BF16__
INLINE void store(bf16* p, Floats v) {
    auto halves = _mm512_cvtneps_pbh((__m512)v);
    memcpy(p, &halves, sizeof halves);
}
#else
INLINE void store(bf16* p, Floats v) {
    for (int i = 0; i < LANES; i++) narrow(v[i], p + i);
}
#endif

template <class T> INLINE T smaller(T a, T b) { return a < b ? a : b; }
template <class T> INLINE T larger(T a, T b) { return a > b ? a : b; }

// e^x to 2e-7, without a branch; of a float or of a vector.
template <class T, class Bits> INLINE T exponential_of(T x) {
    x = smaller(larger(x, T{} - 87.0f), T{} + 88.0f);
    T n = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer, in the low bits
    Bits power;
    memcpy(&power, &n, sizeof n);
    n -= 12582912.0f;
    T r = x - n * 0.693359375f + n * 2.12194440e-4f;
    T p = r * 1.9875691e-4f + 1.3981999e-3f;
    p = p * r + 8.3334519e-3f;
    p = p * r + 4.1665796e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    Bits bits = (power + 127) << 23;
    T scale;
    memcpy(&scale, &bits, sizeof bits);
    return p * scale;
}

INLINE float exponential(float x) { return exponential_of<float, int32_t>(x); }
INLINE Floats exponential(Floats x) { return exponential_of<Floats, Ints>(x); }

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

INLINE float largest(Floats v) { return combine<LANES / 2, 1>(v, [](Floats a, Floats b) { return larger(a, b); })[0]; }

}  // namespace
