// Forward passes over few rows: the trunk, an MTP module, the logits. One call a pass, one team of threads.
//
// Activations are fp32 whatever the weights are. Each output of a product is one sum whose order of additions depends
// on its length alone, so a row's numbers are the same bits whether it runs alone or with others: drafts that are
// verified several at a time meet what plain decoding would have computed.
//
// Names as in `step35/model`: N rows, D model, H query heads, K kv heads, C head dim, I expert hidden.

#include <utility>
#include <vector>

#include <omp.h>
#ifdef __linux__
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "vectors.h"

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// What Python hands over; `program.py` declares the same structures.

enum Type : int32_t { FLOAT32, BFLOAT16, INT8 };

struct Matrix {  // (outs, ins), row after row; int8 rows have a scale each
    const void* data;
    const float* scales;
    int64_t outs, ins;
    int32_t type;
};

struct Mlp {  // gate and up packed in one matrix; of all experts, one behind the other
    Matrix gate_up, down;
    int64_t hidden;
    float clip;
};

struct Layer {
    Matrix attention_norm, qkv, gate, q_norm, k_norm, out, ffn_norm;
    void *keys, *values;
    int32_t heads, kv_heads, head_dim, window, rope;
    int32_t experts, top_k;  // experts 0: `shared` is the dense MLP
    float routed_scale;
    Matrix router, router_bias;
    Mlp routed, shared;
};

struct Module {
    Matrix embedding_norm, hidden_norm, joint, norm, head;
    Layer layer;
};

struct Rope {
    const float* frequencies;
    int64_t half;
};

struct Model {
    Matrix embedding, norm, head;
    Layer* layers;
    Module* modules;
    Rope* ropes;
    void** hidden;  // the trunk's states, then each module's; null without modules
    int32_t layer_count, rope_count, cache_type, threads;
    float eps;
};

struct Batch {
    const int32_t *tokens, *positions, *request;  // of each row
    const int32_t **full, **window;               // each request's block tables
    int32_t rows, first;                          // `first`: the first position that holds anything
};

struct Drafting {  // arrays of `requests`; `start` and `drafts` have as many columns as the deepest drafts
    const int32_t *depth, *length, *start;  // drafts to make, known tokens, first position of each module to run
    const int32_t *first, **known;          // known tokens, from position `first` on
    const int32_t **full, **window;
    int32_t* drafts;
    int32_t requests;
};

// ---------------------------------------------------------------------------------------------------------------------
// Rows of floats, and the types that weights may have.

constexpr int TILE_ROWS = 4, TILE_OUTS = LANES / 4;
constexpr int STRIP = 16;  // outputs that one thread computes together: a cache line
constexpr int DISTANCE = 16384;  // bytes between what is multiplied and what is fetched
constexpr int BLOCK = 16;  // tokens of a cache block

inline float largest(const float* y, int64_t size) {
    Floats most = Floats{} - INFINITY;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) most = larger(most, load(y + i));
    float top = largest(most);
    for (; i < size; i++) top = std::max(top, y[i]);
    return top;
}

inline float sum_of_exponentials(const float* y, int64_t size, float top) {
    Floats sums = {};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) sums += exponential(load(y + i) - top);
    float all = total(sums);
    for (; i < size; i++) all += exponential(y[i] - top);
    return all;
}

// Calls f with a pointer of the matrix's type.
template <class F> inline void typed(int32_t type, const void* data, F f) {
    if (type == FLOAT32) f(static_cast<const float*>(data));
    else if (type == BFLOAT16) f(static_cast<const bf16*>(data));
    else f(static_cast<const int8_t*>(data));
}

// As `typed`, for what the cache holds.
template <class F> inline void cached(int32_t type, void* data, F f) {
    if (type == FLOAT32) f(static_cast<float*>(data));
    else f(static_cast<bf16*>(data));
}

// ---------------------------------------------------------------------------------------------------------------------
// Products of rows with the rows of a matrix.

// Rows of floats where they lie; the matrix's numbers become floats as they are read.
struct Pointed {
    static constexpr int STEP = LANES;  // numbers of a row that are multiplied at a time
    static constexpr int ALONE = 8;     // outputs that are computed together for one row
    const float* const* x;

    Pointed from(int64_t r) const { return {x + r}; }
    Floats part(int64_t r, int64_t d) const { return load(x[r] + d); }
    template <class T> static Floats unit(const T* w) { return load(w); }
    static Floats add(Floats sum, Floats part, Floats unit) { return sum + part * unit; }
};

#ifdef __AVX512BF16__
constexpr bool PAIRS = true;

// Rows of bf16 pairs, for bf16 matrices, which the CPU then multiplies as they are: x = high + low to 16 bits, the high
// parts of a row, then its low parts.
struct Paired {
    static constexpr int STEP = 2 * LANES, ALONE = 4;
    struct Part {
        __m512bh high, low;
    };
    const bf16* x;
    int64_t ins;

    Paired from(int64_t r) const { return {x + 2 * r * ins, ins}; }
    Part part(int64_t r, int64_t d) const {
        const bf16* at = x + 2 * r * ins + d;
        return {unit(at), unit(at + ins)};
    }
    static __m512bh unit(const bf16* w) { return (__m512bh)_mm512_loadu_si512(w); }
    static Floats add(Floats sum, Part part, __m512bh unit) {
        return (Floats)_mm512_dpbf16_ps(_mm512_dpbf16_ps((__m512)sum, part.high, unit), part.low, unit);
    }
};

inline void split(const float* x, int64_t ins, bf16* parts) {
    each(ins, [&](int64_t i) {
        const Floats value = load(x + i);
        store(parts + i, value);
        store(parts + ins + i, value - load(parts + i));
    });
}
#else
constexpr bool PAIRS = false;
#endif

constexpr int power_of_two(int n) { return n <= 1 ? 1 : 2 * power_of_two((n + 1) / 2); }

// y[r][o] = x[r] . w[o], for ROWS rows and OUTS outputs; `stride` from one w to the next. With AHEAD, what comes next is
// fetched meanwhile, since the CPU does not guess it while several rows are read at a time: of a matrix, line by line what
// lies DISTANCE behind; of keys, those of the next tile. REST: `ins` is not a multiple of the step.
template <int ROWS, int OUTS, bool AHEAD, bool REST, class X, class T>
inline void tile(X x, const T* w, int64_t stride, int64_t ins, float* y, int64_t y_stride) {
    constexpr int COUNT = power_of_two(ROWS * OUTS), LINE = 64;
    constexpr int LINES = std::max<int>(1, OUTS * X::STEP * sizeof(T) / LINE);
    Floats sums[COUNT];
#pragma GCC unroll 16
    for (int i = 0; i < COUNT; i++) sums[i] = Floats{};
    int64_t d = 0;
    for (; d + X::STEP <= ins; d += X::STEP) {
        decltype(X::unit(w)) units[OUTS];
        for (int o = 0; o < OUTS; o++) units[o] = X::unit(w + o * stride + d);
        if (AHEAD && stride == ins)
            for (int i = 0; i < LINES; i++)
                __builtin_prefetch((const char*)(w + OUTS * d) + DISTANCE + i * LINE, 0, 2);
        else if (AHEAD)
            for (int o = 0; o < OUTS; o++) __builtin_prefetch(w + (o + OUTS) * stride + d);
        for (int r = 0; r < ROWS; r++) {
            auto part = x.part(r, d);
            for (int o = 0; o < OUTS; o++) sums[r * OUTS + o] = X::add(sums[r * OUTS + o], part, units[o]);
        }
    }
    if constexpr (REST)
        for (int o = 0; o < OUTS; o++) {
            Floats wide = load_some(w + o * stride + d, ins - d);
            for (int r = 0; r < ROWS; r++) sums[r * OUTS + o] += load_some(x.x[r] + d, ins - d) * wide;
        }
    sum<COUNT>(sums);
    for (int r = 0; r < ROWS; r++)
        for (int o = 0; o < OUTS; o++) y[r * y_stride + o] = sums[0][r * OUTS + o];
}

template <int ROWS, bool AHEAD, bool REST, class X, class T>
inline void tiles(X x, const T* w, int64_t stride, int64_t ins, int outs, float* y, int64_t y_stride) {
    constexpr int OUTS = ROWS == 1 ? X::ALONE : TILE_OUTS;
    int o = 0;
    for (; o + OUTS <= outs; o += OUTS) tile<ROWS, OUTS, AHEAD, REST>(x, w + o * stride, stride, ins, y + o, y_stride);
    for (; o < outs; o++) tile<ROWS, 1, false, REST>(x, w + o * stride, stride, ins, y + o, y_stride);
}

// y[r][o] = x[r] . w[o] for any number of rows and of outputs.
template <bool REST, class X, class T>
inline void products(X x, int64_t rows, const T* w, int64_t stride, int64_t ins, int outs, float* y, int64_t y_stride) {
    if (rows >= TILE_ROWS) tiles<TILE_ROWS, true, REST>(x, w, stride, ins, outs, y, y_stride);
    int64_t r = TILE_ROWS;
    for (; r + TILE_ROWS <= rows; r += TILE_ROWS)
        tiles<TILE_ROWS, false, REST>(x.from(r), w, stride, ins, outs, y + r * y_stride, y_stride);
    r = rows / TILE_ROWS * TILE_ROWS;
    x = x.from(r), y += r * y_stride;
    if (rows - r == 3) tiles<3, true, REST>(x, w, stride, ins, outs, y, y_stride);
    if (rows - r == 2) tiles<2, true, REST>(x, w, stride, ins, outs, y, y_stride);
    if (rows - r == 1) tiles<1, true, REST>(x, w, stride, ins, outs, y, y_stride);
}

template <class T>
inline void products(const float* const* x, int64_t rows, const T* w, int64_t stride, int64_t ins, int outs, float* y,
                     int64_t y_stride) {
    if (ins % LANES) products<true>(Pointed{x}, rows, w, stride, ins, outs, y, y_stride);
    else products<false>(Pointed{x}, rows, w, stride, ins, outs, y, y_stride);
}

// ---------------------------------------------------------------------------------------------------------------------
// The same for bf16 matrices on CPUs that multiply tiles of 16 x 32 by 32 x 16 (AMX), of rows split in the same way.

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
constexpr int TILE_INS = 32;

// Linux lets a process use the tile registers once it has asked.
const bool AMX = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XFEATURE_XTILEDATA */) == 0;

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    void shape(int tile, int row_count, int bytes) { rows[tile] = row_count, row_bytes[tile] = bytes; }
};

thread_local int configured_outs = 0, configured_rows = 0;

// Tiles 0 to 3 are sums of high and low parts, for up to two groups of rows; 4 and 5 these parts, 6 the matrix.
inline void configure_tiles(int outs, int count) {
    if (outs == configured_outs && count == configured_rows) return;
    configured_outs = outs, configured_rows = count;
    TileConfig config;
    for (int tile : {0, 1, 2, 3}) config.shape(tile, outs, count * 4);
    for (int tile : {4, 5}) config.shape(tile, TILE_INS / 2, count * 4);
    config.shape(6, outs, TILE_INS * 2);
    _tile_loadconfig(&config);
}

// At the end of a pass, in each thread: others may use the tiles in another shape.
inline void release_tiles() {
    configured_outs = configured_rows = 0;
    _tile_release();
}

// Up to 16 rows of x, `count` of them, side by side: for each pair of ins, the pairs of all rows; high parts of a tile,
// then its low parts.
inline void pack(const float* const* x, int count, int64_t ins, bf16* packed) {
    for (int64_t block = 0; block < ins; block += TILE_INS, packed += 2 * TILE_INS * count)
        for (int r = 0; r < count; r++)
            for (int half = 0; half < TILE_INS; half += 16) {
                __m512 value = _mm512_loadu_ps(x[r] + block + half);
                __m256i high = (__m256i)_mm512_cvtneps_pbh(value);
                __m512 rest = value - (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
                __m256i low = (__m256i)_mm512_cvtneps_pbh(rest);
                int32_t pairs[2][8];
                memcpy(pairs[0], &high, 32), memcpy(pairs[1], &low, 32);
                for (int part = 0; part < 2; part++)
                    for (int i = 0; i < 8; i++)
                        memcpy(packed + (part * TILE_INS + half + 2 * i) * count + 2 * r, &pairs[part][i], 4);
            }
}

inline void unpack(const float* high, const float* low, int count, int outs, float* y) {
    for (int r = 0; r < count; r++)
        for (int o = 0; o < outs; o++) y[r * STRIP + o] = high[o * count + r] + low[o * count + r];
}

// Outputs of `outs` matrix rows for `count` packed rows; with PAIR, also for as many rows packed behind these.
template <bool PAIR>
inline void tile_products(const bf16* packed, int count, const bf16* w, int64_t ins, int outs, bool ahead, float* y) {
    const int64_t half = TILE_INS * count, next = 2 * ins * count;
    configure_tiles(outs, count);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t d = 0; d < ins; d += TILE_INS, packed += 2 * half) {
        for (int o = 0; ahead && o < outs; o++) __builtin_prefetch(w + (o + STRIP) * ins + d);
        _tile_loadd(6, w + d, ins * 2);
        _tile_loadd(4, packed, count * 4);
        _tile_dpbf16ps(0, 6, 4);
        _tile_loadd(5, packed + half, count * 4);
        _tile_dpbf16ps(1, 6, 5);
        if (PAIR) {
            _tile_loadd(4, packed + next, count * 4);
            _tile_dpbf16ps(2, 6, 4);
            _tile_loadd(5, packed + next + half, count * 4);
            _tile_dpbf16ps(3, 6, 5);
        }
    }
    float sums[4][16 * 16];
    _tile_stored(0, sums[0], count * 4);
    _tile_stored(1, sums[1], count * 4);
    unpack(sums[0], sums[1], count, outs, y);
    if (PAIR) {
        _tile_stored(2, sums[2], count * 4);
        _tile_stored(3, sums[3], count * 4);
        unpack(sums[2], sums[3], count, outs, y + count * STRIP);
    }
}
#else
constexpr bool AMX = false;
constexpr int TILE_INS = 32;
inline void pack(const float* const*, int, int64_t, bf16*) {}
template <bool PAIR> inline void tile_products(const bf16*, int, const bf16*, int64_t, int, bool, float*) {}
inline void release_tiles() {}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Rows that matrices are to be multiplied with.

template <class T> inline T* grow(std::vector<T>& buffer, int64_t size) {
    if (int64_t(buffer.size()) < size) buffer.resize(size);
    return buffer.data();
}

// Of each thread: the strip it works on, the rows it reads, and these packed.
thread_local std::vector<float> part;
thread_local std::vector<const float*> row_pointers;
thread_local std::vector<bf16> packed_rows;

struct Rows {
    const float* const* x;
    int64_t count;
    const bf16* packed;  // high and low parts, for tiles or as `Paired`; null where floats are multiplied

    // Prepares rows given by pointers, of this thread, for products with `m`.
    static Rows of(const Matrix& m, const float* const* x, int64_t count) {
        if (!(AMX || PAIRS) || m.type != BFLOAT16 || m.ins % TILE_INS) return {x, count, nullptr};
        bf16* packed = grow(packed_rows, 2 * count * m.ins);
        if (AMX)
            for (int64_t r = 0; r < count; r += 16)
                pack(x + r, std::min<int64_t>(16, count - r), m.ins, packed + 2 * r * m.ins);
#ifdef __AVX512BF16__
        else
            for (int64_t r = 0; r < count; r++) split(x[r], m.ins, packed + 2 * r * m.ins);
#endif
        return {x, count, packed};
    }

    // The same for `count` rows of x, one behind the other.
    static Rows of(const Matrix& m, const float* x, int64_t count) {
        const float** pointers = grow(row_pointers, count);
        for (int64_t n = 0; n < count; n++) pointers[n] = x + n * m.ins;
        return of(m, pointers, count);
    }
};

// Outputs `begin` to `begin + count` of a matrix, into y (rows, STRIP).
inline void strip(const Matrix& m, const Rows& rows, int64_t begin, int count, float* y) {
    if (rows.packed) {
        const bf16* w = static_cast<const bf16*>(m.data) + begin * m.ins;
#ifdef __AVX512BF16__
        if (!AMX) return products<false>(Paired{rows.packed, m.ins}, rows.count, w, m.ins, m.ins, count, y, STRIP);
#endif
        int64_t r = 0;
        for (; r + 32 <= rows.count; r += 32)
            tile_products<true>(rows.packed + 2 * r * m.ins, 16, w, m.ins, count, r == 0, y + r * STRIP);
        for (; r < rows.count; r += 16) {
            int most = std::min<int64_t>(16, rows.count - r);
            tile_products<false>(rows.packed + 2 * r * m.ins, most, w, m.ins, count, r == 0, y + r * STRIP);
        }
        return;
    }
    typed(m.type, m.data, [&](auto* w) { products(rows.x, rows.count, w + begin * m.ins, m.ins, m.ins, count, y, STRIP); });
    if (m.scales)
        for (int64_t r = 0; r < rows.count; r++)
            for (int o = 0; o < count; o++) y[r * STRIP + o] *= m.scales[begin + o];
}

// ---------------------------------------------------------------------------------------------------------------------
// One pass. All members are called by every thread of the team; `omp for` shares the work and ends in a barrier.

struct Buffers {  // kept from pass to pass
    std::vector<float> x, heads, gates, attended, scores, weights, active, joint, shared_active, cos, sin, states, logits;
    std::vector<int32_t> chosen, start, entry, experts;
};

thread_local Buffers kept;  // of the thread that calls

inline int64_t widest_rope(const Model& model) {
    int64_t most = 0;
    for (int r = 0; r < model.rope_count; r++) most = std::max(most, model.ropes[r].half);
    return most;
}

struct Pass {
    const Model& model;
    const Batch& batch;
    Buffers& b;
    float* h;  // (N, D)
    const int64_t rows = batch.rows, D = model.embedding.ins;
    const int64_t half_stride = widest_rope(model), rope_stride = rows * half_stride;  // of cos and sin

    int64_t slot(const int32_t** tables, int64_t row, int64_t position) const {
        return tables[batch.request[row]][position / BLOCK] * BLOCK + position % BLOCK;
    }

    void prepare(const Layer& layer) {
        int64_t heads = layer.heads, wide = layer.qkv.outs, attended = heads * layer.head_dim;
        grow(b.x, rows * D);
        grow(b.heads, rows * wide);
        grow(b.gates, rows * heads);
        grow(b.attended, rows * attended);
        grow(b.shared_active, rows * layer.shared.hidden);
        grow(b.scores, rows * layer.experts);
        grow(b.weights, rows * layer.top_k);
        grow(b.chosen, rows * layer.top_k);
        grow(b.entry, rows * layer.top_k);
        grow(b.start, layer.experts + 1);
        grow(b.active, rows * layer.top_k * layer.routed.hidden);
    }

    // y (rows, outs) = x m^T; `add` adds to what y holds.
    void multiply(const Matrix& m, const float* x, float* y, bool add = false) {
        const Rows prepared = Rows::of(m, x, rows);
#pragma omp for schedule(static)
        for (int64_t s = 0; s < strips(m.outs); s++) {
            int64_t begin = s * STRIP;
            int outs = std::min<int64_t>(STRIP, m.outs - begin);
            float* sums = grow(part, rows * STRIP);
            strip(m, prepared, begin, outs, sums);
            for (int64_t n = 0; n < rows; n++)
                for (int o = 0; o < outs; o++) {
                    float& target = y[n * m.outs + begin + o];
                    target = add ? target + sums[n * STRIP + o] : sums[n * STRIP + o];
                }
        }
    }

    static int64_t strips(int64_t outs) { return (outs + STRIP - 1) / STRIP; }

    // y = x / rms(x) * (1 + w), over `size` floats.
    void norm(const float* x, const Matrix& weight, int64_t size, float* y) const {
        Floats squares = {};
        int64_t d = 0;
        for (; d + LANES <= size; d += LANES) squares += load(x + d) * load(x + d);
        if (d < size) squares += load_some(x + d, size - d) * load_some(x + d, size - d);
        float scale = 1.0f / std::sqrt(total(squares) / size + model.eps);
        typed(weight.type, weight.data, [&](auto* w) {
            for (int64_t i = 0; i < size; i++) y[i] = x[i] * scale * (1.0f + widen(w[i]));
        });
    }

    void norm_rows(const Matrix& weight) {
#pragma omp for schedule(static)
        for (int64_t n = 0; n < rows; n++) norm(h + n * D, weight, D, &b.x[n * D]);
    }

    void embed(int64_t row, float* y) const {
        typed(model.embedding.type, model.embedding.data, [&](auto* table) {
            auto* from = table + batch.tokens[row] * D;
            float scale = model.embedding.scales ? model.embedding.scales[batch.tokens[row]] : 1.0f;
            for (int64_t d = 0; d < D; d++) y[d] = widen(from[d]) * scale;
        });
    }

    void angles() {
        for (int r = 0; r < model.rope_count; r++) {
            const Rope& rope = model.ropes[r];
#pragma omp for schedule(static) nowait
            for (int64_t n = 0; n < rows; n++)
                for (int64_t j = 0; j < rope.half; j++) {
                    float angle = float(batch.positions[n]) * rope.frequencies[j];
                    b.cos[r * rope_stride + n * half_stride + j] = std::cos(angle);
                    b.sin[r * rope_stride + n * half_stride + j] = std::sin(angle);
                }
        }
    }

    void block(const Layer& layer) {
        norm_rows(layer.attention_norm);
        multiply(layer.qkv, b.x.data(), b.heads.data());
        multiply(layer.gate, b.x.data(), b.gates.data());
        store_heads(layer);
        attention(layer);
        multiply(layer.out, b.attended.data(), h, true);
        norm_rows(layer.ffn_norm);
        if (layer.experts) route(layer);
        hidden(layer);
        down(layer);
    }

    // Norm and rotate queries in place; keys and values go to the cache.
    void store_heads(const Layer& layer) {
        int64_t C = layer.head_dim, H = layer.heads, K = layer.kv_heads, all = H + 2 * K;
        const int32_t** tables = layer.window ? batch.window : batch.full;
        int64_t half = model.ropes[layer.rope].half;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * all; i++) {
            int64_t n = i / all, head = i % all;
            float* x = &b.heads[i * C];
            if (head < H + K) {
                norm(x, head < H ? layer.q_norm : layer.k_norm, C, x);
                const float* cos = &b.cos[layer.rope * rope_stride + n * half_stride];
                const float* sin = &b.sin[layer.rope * rope_stride + n * half_stride];
                for (int64_t j = 0; j < half; j++) {
                    float first = x[j], second = x[j + half];
                    x[j] = first * cos[j] - second * sin[j];
                    x[j + half] = second * cos[j] + first * sin[j];
                }
            }
            if (head >= H) {
                void* store = head < H + K ? layer.keys : layer.values;
                int64_t place = (slot(tables, n, batch.positions[n]) * K + (head - H) % K) * C;
                cached(model.cache_type, store, [&](auto* cache) {
                    for (int64_t c = 0; c < C; c++) narrow(x[c], cache + place + c);
                });
            }
        }
    }

    void attention(const Layer& layer) {
        int64_t K = layer.kv_heads;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < rows * K; i++)
            cached(model.cache_type, layer.keys, [&](auto* keys) {
                attend(layer, i / K, i % K, keys, static_cast<decltype(keys)>(layer.values));
            });
    }

    // One row, and the query heads that share one kv head, over all visible blocks, with a running softmax.
    template <class T> void attend(const Layer& layer, int64_t n, int64_t kv, const T* keys, const T* values) {
        const int64_t C = layer.head_dim, stride = layer.kv_heads * C, group = layer.heads / layer.kv_heads;
        const int64_t last = batch.positions[n], first = first_visible(layer, last);
        const int32_t* table = (layer.window ? batch.window : batch.full)[batch.request[n]];
        const float* queries = &b.heads[n * layer.qkv.outs + kv * group * C];
        float* out = &b.attended[(n * layer.heads + kv * group) * C];
        const float scale = 1.0f / std::sqrt(float(C));
        const float* q[MOST_HEADS];
        float top[MOST_HEADS], scores[MOST_HEADS * BLOCK];
        Floats totals[MOST_HEADS];
        for (int64_t g = 0; g < group; g++) q[g] = queries + g * C, top[g] = -INFINITY, totals[g] = Floats{};
        std::fill(out, out + group * C, 0.0f);
        for (int64_t block = first / BLOCK; block <= last / BLOCK; block++) {
            int64_t from = std::max(first, block * BLOCK), count = std::min(last + 1, (block + 1) * BLOCK) - from;
            int64_t place = (table[block] * BLOCK + from % BLOCK) * stride + kv * C;
            for (int64_t s = 0; s < count; s++)
                for (int64_t c = 0; c < C; c += 64 / sizeof(T)) __builtin_prefetch(values + place + s * stride + c);
            products(q, group, keys + place, stride, C, count, scores, BLOCK);
            for (int64_t g = 0; g < group; g++)
                soften(scores + g * BLOCK, count, scale, top[g], &totals[g], out + g * C, C);
            for (int64_t g = 0; g < group; g += 4) {
                auto weigh = group - g >= 4 ? weigh_values<4, T> : group - g == 3 ? weigh_values<3, T>
                             : group - g == 2 ? weigh_values<2, T> : weigh_values<1, T>;
                weigh(values + place, stride, count, scores + g * BLOCK, out + g * C, C);
            }
        }
        for (int64_t g = 0; g < group; g++) {
            sum<1>(&totals[g]);
            float gate = sigmoid(b.gates[n * layer.heads + kv * group + g]) / totals[g][0];
            for (int64_t c = 0; c < C; c++) out[g * C + c] *= gate;
        }
    }

    static constexpr int MOST_HEADS = 64;

    // out (HEADS, C) += weights (HEADS, BLOCK) times the first `count` values.
    template <int HEADS, class T>
    static void weigh_values(const T* values, int64_t stride, int64_t count, const float* weights, float* out, int64_t C) {
        int64_t c = 0;
        for (; c + LANES <= C; c += LANES) {
            Floats sums[HEADS];
            for (int g = 0; g < HEADS; g++) sums[g] = load(out + g * C + c);
            for (int64_t s = 0; s < count; s++) {
                Floats value = load(values + s * stride + c);
                for (int g = 0; g < HEADS; g++) sums[g] += weights[g * BLOCK + s] * value;
            }
            for (int g = 0; g < HEADS; g++) memcpy(out + g * C + c, &sums[g], sizeof(Floats));
        }
        for (; c < C; c++)
            for (int g = 0; g < HEADS; g++)
                for (int64_t s = 0; s < count; s++) out[g * C + c] += weights[g * BLOCK + s] * widen(values[s * stride + c]);
    }

    int64_t first_visible(const Layer& layer, int64_t position) const {
        return std::max<int64_t>(batch.first, layer.window ? position - layer.window + 1 : 0);
    }

    // Turn scores (BLOCK) into weights relative to the running maximum `top`; what was summed before is scaled to it.
    static void soften(float* scores, int count, float scale, float& top, Floats* totals, float* out, int64_t size) {
        constexpr int PARTS = BLOCK / LANES;
        for (int s = count; s < BLOCK; s++) scores[s] = -INFINITY;
        Floats v[PARTS], most = Floats{} - INFINITY;
        for (int part = 0; part < PARTS; part++) v[part] = load(scores + part * LANES) * scale, most = larger(most, v[part]);
        float highest = largest(most);
        if (highest > top) {
            float shrink = top == -INFINITY ? 0.0f : exponential(top - highest);
            for (int64_t c = 0; c < size; c++) out[c] *= shrink;
            *totals *= shrink;
            top = highest;
        }
        for (int part = 0; part < PARTS; part++) {
            v[part] = exponential(v[part] - top);  // 1e-38 behind `count`
            *totals += v[part];
            memcpy(scores + part * LANES, &v[part], sizeof(Floats));
        }
    }

    // Choose each row's experts and weigh them; then list the rows of each expert.
    void route(const Layer& layer) {
        const int64_t E = layer.experts, top_k = layer.top_k;
        multiply(layer.router, b.x.data(), b.scores.data());
#pragma omp for schedule(static)
        for (int64_t n = 0; n < rows; n++) choose(layer, &b.scores[n * E], &b.chosen[n * top_k], &b.weights[n * top_k]);
#pragma omp single
        {
            std::fill(b.start.begin(), b.start.end(), 0);
            for (int64_t i = 0; i < rows * top_k; i++) b.start[b.chosen[i] + 1]++;
            for (int64_t e = 0; e < E; e++) b.start[e + 1] += b.start[e];
            std::vector<int32_t> next(b.start.begin(), b.start.end());
            for (int64_t i = 0; i < rows * top_k; i++) b.entry[next[b.chosen[i]]++] = i;
            b.experts.clear();
            for (int64_t e = 0; e < E; e++)
                if (b.start[e + 1] > b.start[e]) b.experts.push_back(e);
        }
    }

    void choose(const Layer& layer, float* scores, int32_t* chosen, float* weights) const {
        const int64_t E = layer.experts, top_k = layer.top_k;
        float biased[MOST_EXPERTS];
        for (int64_t e = 0; e < E; e++) scores[e] = sigmoid(scores[e]);
        typed(layer.router_bias.type, layer.router_bias.data, [&](auto* bias) {
            for (int64_t e = 0; e < E; e++) biased[e] = scores[e] + widen(bias[e]);
        });
        float total = 0;
        for (int64_t k = 0; k < top_k; k++) {
            chosen[k] = std::max_element(biased, biased + E) - biased;
            biased[chosen[k]] = -INFINITY;
            total += weights[k] = scores[chosen[k]];
        }
        for (int64_t k = 0; k < top_k; k++) weights[k] *= layer.routed_scale / total;
    }

    static constexpr int MOST_EXPERTS = 4096;

    // The intermediate activations of the shared (or dense) MLP, then of every chosen expert.
    void hidden(const Layer& layer) {
        const int64_t I = layer.routed.hidden, shared = strips(layer.shared.hidden), each = strips(I);
        const int64_t active = layer.experts ? b.experts.size() : 0;
        int64_t prepared = -1;  // whose rows are ready: 0 for the shared MLP, 1 for the first active expert, ...
        Rows x{};
#pragma omp for schedule(static)
        for (int64_t task = 0; task < shared + active * each; task++) {
            int64_t number = task < shared ? 0 : 1 + (task - shared) / each;
            int64_t e = number ? b.experts[number - 1] : 0, start = number ? b.start[e] : 0;
            if (number != prepared) x = number ? rows_of(layer, e) : Rows::of(layer.shared.gate_up, b.x.data(), rows);
            prepared = number;
            if (number) swiglu(layer.routed, e, (task - shared) % each, x, &b.active[start * I]);
            else swiglu(layer.shared, 0, task, x, b.shared_active.data());
        }
    }

    // The rows that have chosen expert e.
    Rows rows_of(const Layer& layer, int64_t e) const {
        int64_t start = b.start[e], count = b.start[e + 1] - start;
        const float** x = grow(row_pointers, count);
        for (int64_t i = 0; i < count; i++) x[i] = &b.x[b.entry[start + i] / layer.top_k * D];
        return Rows::of(layer.routed.gate_up, x, count);
    }

    // Strip `number` of one expert's activations, into y (count, hidden).
    void swiglu(const Mlp& mlp, int64_t expert, int64_t number, const Rows& rows, float* y) {
        int64_t count = rows.count, begin = number * STRIP, first = expert * 2 * mlp.hidden + begin;
        int outs = std::min<int64_t>(STRIP, mlp.hidden - begin);
        float *gate = grow(part, 2 * count * STRIP), *up = gate + count * STRIP;
        strip(mlp.gate_up, rows, first, outs, gate);
        strip(mlp.gate_up, rows, first + mlp.hidden, outs, up);
        for (int64_t i = 0; i < count; i++) {
            const float *g = gate + i * STRIP, *u = up + i * STRIP;
            float *to = y + i * mlp.hidden + begin, most = mlp.clip > 0 ? mlp.clip : INFINITY;
            for (int o = 0; o < outs; o++)
                to[o] = std::min(g[o] * sigmoid(g[o]), most) * std::min(std::max(u[o], -most), most);
        }
    }

    // h += shared + sum of weight * expert, the experts in the order of their numbers. Each thread has columns of its own.
    void down(const Layer& layer) {
        const int64_t I = layer.routed.hidden, team = omp_get_num_threads(), me = omp_get_thread_num();
        const int64_t from = strips(D) * me / team, to = strips(D) * (me + 1) / team;
        const Rows shared = Rows::of(layer.shared.down, b.shared_active.data(), rows);
        add_strips(layer.shared.down, shared, 0, from, to, [&](int64_t n) { return std::pair(n, 1.0f); });
        if (layer.experts)
            for (int32_t e : b.experts) {
                int64_t start = b.start[e];
                const Rows x = Rows::of(layer.routed.down, &b.active[start * I], b.start[e + 1] - start);
                add_strips(layer.routed.down, x, e * D, from, to, [&](int64_t i) {
                    int32_t entry = b.entry[start + i];
                    return std::pair<int64_t, float>(entry / layer.top_k, b.weights[entry]);
                });
            }
#pragma omp barrier
    }

    // For each row i of x, add weight * (x m^T) to a row of h: `target` gives both. `first`: the first row of m.
    template <class F>
    void add_strips(const Matrix& m, const Rows& x, int64_t first, int64_t from, int64_t to, F target) {
        float* sums = grow(part, x.count * STRIP);
        for (int64_t s = from; s < to; s++) {
            int64_t begin = s * STRIP;
            int outs = std::min<int64_t>(STRIP, D - begin);
            strip(m, x, first + begin, outs, sums);
            for (int64_t i = 0; i < x.count; i++) {
                auto [n, weight] = target(i);
                float* y = h + n * D + begin;
                for (int o = 0; o < outs; o++) y[o] += weight * sums[i * STRIP + o];
            }
        }
    }

    void keep(int state) {
        cached(model.cache_type, model.hidden[state], [&](auto* states) {
#pragma omp for schedule(static)
            for (int64_t n = 0; n < rows; n++) {
                auto* to = states + slot(batch.window, n, batch.positions[n]) * D;
                for (int64_t d = 0; d < D; d++) narrow(h[n * D + d], to + d);
            }
        });
    }

    // [norm(embedding); norm(state of the position before)]
    void join(int k, const Module& module) {
#pragma omp for schedule(static)
        for (int64_t n = 0; n < rows; n++) {
            float *embedding = &b.joint[n * 2 * D], *state = embedding + D;
            embed(n, embedding);
            norm(embedding, module.embedding_norm, D, embedding);
            cached(model.cache_type, model.hidden[k], [&](auto* states) {
                auto* from = states + slot(batch.window, n, batch.positions[n] - 1) * D;
                for (int64_t d = 0; d < D; d++) state[d] = widen(from[d]);
            });
            norm(state, module.hidden_norm, D, state);
        }
    }
};

void prepare(Pass& pass, const Layer* layers, int count) {
    for (int i = 0; i < count; i++) pass.prepare(layers[i]);
    grow(pass.b.cos, pass.model.rope_count * pass.rope_stride);
    grow(pass.b.sin, pass.model.rope_count * pass.rope_stride);
}

// Keep each worker thread of the caller's team on a core of its own, once; the caller itself stays free.
inline void pin(int32_t threads) {
    static thread_local bool pinned = false;
    if (pinned) return;
    pinned = true;
#ifdef __linux__
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed)) return;
    std::vector<int> cores;
    for (int core = 0; core < CPU_SETSIZE; core++)
        if (CPU_ISSET(core, &allowed)) cores.push_back(core);
    if (int(cores.size()) != threads) return;  // otherwise another process may have the same idea
#pragma omp parallel num_threads(threads)
    if (int number = omp_get_thread_num()) {
        cpu_set_t own;
        CPU_ZERO(&own);
        CPU_SET(cores[number], &own);
        sched_setaffinity(0, sizeof own, &own);
    }
#endif
}

}  // namespace

extern "C" {

// h (N, D) = the trunk's output before the final norm; the states that modules read are kept too.
void trunk(const Model* model, const Batch* batch, float* h) {
    Pass pass{*model, *batch, kept, h};
    prepare(pass, model->layers, model->layer_count);
    pin(model->threads);
#pragma omp parallel num_threads(model->threads)
    {
#pragma omp for schedule(static) nowait
        for (int64_t n = 0; n < pass.rows; n++) pass.embed(n, h + n * pass.D);
        pass.angles();
#pragma omp barrier
        for (int i = 0; i < model->layer_count; i++) pass.block(model->layers[i]);
        if (model->hidden) pass.keep(0);
        release_tiles();
    }
}

// h (N, D) = the output of MTP module k.
void module(const Model* model, int32_t k, const Batch* batch, float* h) {
    Pass pass{*model, *batch, kept, h};
    const Module& module = model->modules[k];
    prepare(pass, &module.layer, 1);
    grow(kept.joint, pass.rows * 2 * pass.D);
#pragma omp parallel num_threads(model->threads)
    {
        pass.join(k, module);
        pass.angles();
        pass.multiply(module.joint, pass.b.joint.data(), h);
        pass.block(module.layer);
        pass.keep(k + 1);
        release_tiles();
    }
}

// y (count, V) = logits of the rows h (count, D), of the trunk (k = -1) or of MTP module k. Also each row's likeliest
// token, the lowest of equals, and its log-probability.
void logits(const Model* model, int32_t k, const float* h, int32_t count, float* y, int32_t* best, float* logprobs) {
    Batch batch{};
    batch.rows = count;
    Pass pass{*model, batch, kept, const_cast<float*>(h)};
    const Matrix& head = k < 0 ? model->head : model->modules[k].head;
    grow(kept.x, count * pass.D);
#pragma omp parallel num_threads(model->threads)
    {
        pass.norm_rows(k < 0 ? model->norm : model->modules[k].norm);
        pass.multiply(head, pass.b.x.data(), y);
        release_tiles();
#pragma omp for schedule(static)
        for (int64_t n = 0; n < count; n++) {
            const float* row = y + n * head.outs;
            float top = largest(row, head.outs);
            best[n] = std::min(std::find(row, row + head.outs, top) - row, head.outs - 1);  // all may be NaN
            logprobs[n] = -std::log(sum_of_exponentials(row, head.outs, top));
        }
    }
}

// Let module after module propose a token behind what is known and proposed so far, for all requests together.
void draft(const Model* model, const Drafting* d) {
    int32_t deepest = *std::max_element(d->depth, d->depth + d->requests);
    std::vector<int32_t> tokens, positions, request, last, best;
    std::vector<float> logprobs;
    for (int32_t k = 0; k < deepest; k++) {
        tokens.clear(), positions.clear(), request.clear(), last.clear();
        for (int32_t r = 0; r < d->requests; r++) {
            if (d->depth[r] <= k) continue;
            for (int32_t p = d->start[r * deepest + k]; p < d->length[r] + k; p++) {
                bool known = p < d->length[r];
                tokens.push_back(known ? d->known[r][p - d->first[r]] : d->drafts[r * deepest + p - d->length[r]]);
                positions.push_back(p), request.push_back(r);
            }
            last.push_back(int32_t(tokens.size()) - 1);
        }
        Batch batch{tokens.data(), positions.data(), request.data(), d->full, d->window, int32_t(tokens.size()), k + 1};
        const int64_t D = model->embedding.ins, count = last.size();
        float *h = grow(kept.states, (batch.rows + count) * D), *ends = h + batch.rows * D;
        module(model, k, &batch, h);
        for (int64_t i = 0; i < count; i++) std::copy_n(h + last[i] * D, D, ends + i * D);
        float* y = grow(kept.logits, count * model->head.outs);
        logits(model, k, ends, count, y, grow(best, count), grow(logprobs, count));
        for (int64_t i = 0; i < count; i++) d->drafts[request[last[i]] * deepest + k] = best[i];
    }
}
}
