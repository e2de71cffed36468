// Forward passes over few rows: the trunk, an MTP module, the logits. One call a pass, one team of threads.
//
// Activations are fp32 whatever the weights are. Each output of a product is one sum whose order of additions depends
// on its length alone, so a row's numbers are the same bits whether it runs alone or with others: drafts that are
// verified several at a time meet what plain decoding would have computed.
//
// Names as in `step35/model`: N rows, D model, H query heads, K kv heads, C head dim, I expert hidden.

#include <atomic>
#include <initializer_list>
#include <tuple>
#include <utility>
#include <vector>

#include <omp.h>
#include <unistd.h>
#ifdef __linux__
#include <sched.h>
#include <sys/syscall.h>
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
    Matrix embedding_norm, hidden_norm, joint, norm, head;  // `head`: of the draft vocabulary, the first tokens
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

struct Asked {  // of one request, some of whose positions run; followed by the first position of each module to run
    int32_t drafts;      // to make behind all known tokens
    int32_t first;       // the first position whose token is given
    int32_t start, end;  // known positions that the trunk runs, before the drafts
    int32_t ready;       // whether the logits of the last of them, and of the drafts, are wanted
};

struct Requests {
    const int32_t* asked;   // `Asked` and first positions, request after request
    const int32_t* tokens;  // of all requests, each from `first` up to `end`
    const int32_t **full, **window;
    int32_t count, modules;

    const int32_t* of(int32_t r) const { return asked + r * (sizeof(Asked) / sizeof(int32_t) + modules); }
    const Asked& operator[](int32_t r) const { return *reinterpret_cast<const Asked*>(of(r)); }
    int32_t start(int32_t r, int32_t module) const { return of(r)[sizeof(Asked) / sizeof(int32_t) + module]; }
};

// ---------------------------------------------------------------------------------------------------------------------
// Rows of floats, and the types that weights may have.

constexpr int TILE_ROWS = 4, TILE_OUTS = LANES / 4;
constexpr int STRIP = 16;  // outputs that one thread computes together: a cache line
constexpr int BLOCK = 16;  // tokens of a cache block

inline float largest(const float* y, int64_t size) {
    Floats most = Floats{} - INFINITY;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) most = larger(most, load(y + i));
    float top = largest(most);
    for (; i < size; i++) top = std::max(top, y[i]);
    return top;
}

// The place of the largest, the first of equals; looked for once it is known in which part it lies.
inline int64_t place_of_largest(const float* y, int64_t size) {
    constexpr int64_t PART = 16 * LANES;
    int64_t part = 0;
    float top = -INFINITY;
    for (int64_t i = 0; i < size; i += PART) {
        const float here = largest(y + i, std::min(PART, size - i));
        if (here > top) top = here, part = i;
    }
    const int64_t end = std::min(part + PART, size);
    return std::min(std::find(y + part, y + end, top) - y, end - 1);  // where all are NaN, the end of the first part
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
    static Floats add(Floats sum, Floats part, Floats unit) { return multiply_add(part, unit, sum); }
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

// The first cache has room for a strip that is multiplied and for the next from 48 KB on; below, the second takes it.
#ifdef _SC_LEVEL1_DCACHE_SIZE
const bool ROOMY = sysconf(_SC_LEVEL1_DCACHE_SIZE) >= 48 << 10;
#else
constexpr bool ROOMY = false;
#endif

inline void prefetch(const char* at) {
    if (ROOMY) __builtin_prefetch(at, 0, 3);
    else __builtin_prefetch(at, 0, 2);
}

constexpr int power_of_two(int n) { return n <= 1 ? 1 : 2 * power_of_two((n + 1) / 2); }

// y[r][o] = x[r] . w[o], for ROWS rows and OUTS outputs; rows lie STRIP apart in y. With AHEAD, what lies at `ahead` is
// fetched meanwhile, line by line: the CPU does not guess it while several rows are read at a time. REST: `ins` is no
// multiple of the step.
template <int ROWS, int OUTS, bool AHEAD, bool REST, class X, class T>
inline void tile(X x, const T* w, int64_t ins, float* y, const char* ahead) {
    constexpr int COUNT = power_of_two(ROWS * OUTS), LINE = 64;
    constexpr int LINES = std::max<int>(1, OUTS * X::STEP * sizeof(T) / LINE);
    Floats sums[COUNT];
    unrolled<COUNT>([&](auto i) INLINED { sums[i] = Floats{}; });
    int64_t d = 0;
    for (; d + X::STEP <= ins; d += X::STEP) {
        decltype(x.part(0, d)) parts[ROWS];
        unrolled<ROWS>([&](auto r) INLINED { parts[r] = x.part(r, d); });
        if (AHEAD)
            for (int i = 0; i < LINES; i++) prefetch(ahead + OUTS * d * sizeof(T) + i * LINE);
        unrolled<OUTS>([&](auto o) INLINED {
            auto unit = X::unit(w + o * ins + d);
            unrolled<ROWS>([&](auto r) INLINED { sums[r * OUTS + o] = X::add(sums[r * OUTS + o], parts[r], unit); });
        });
    }
    if constexpr (REST)
        unrolled<OUTS>([&](auto o) INLINED {
            Floats wide = load_some(w + o * ins + d, ins - d);
            unrolled<ROWS>([&](auto r) INLINED {
                sums[r * OUTS + o] = multiply_add(load_some(x.x[r] + d, ins - d), wide, sums[r * OUTS + o]);
            });
        });
    sum<COUNT>(sums);
    for (int r = 0; r < ROWS; r++)
        for (int o = 0; o < OUTS; o++) y[r * STRIP + o] = sums[0][r * OUTS + o];
}

// All outputs of ROWS rows.
template <int ROWS, bool AHEAD, bool REST, class X, class T>
INLINE void tiles(X x, const T* w, int64_t ins, int outs, float* y, const char* ahead) {
    constexpr int OUTS = ROWS == 1 ? X::ALONE : TILE_OUTS;
    int o = 0;
    for (; o + OUTS <= outs; o += OUTS)
        tile<ROWS, OUTS, AHEAD, REST>(x, w + o * ins, ins, y + o, ahead + o * ins * sizeof(T));
    for (; o < outs; o++) tile<ROWS, 1, false, REST>(x, w + o * ins, ins, y + o, ahead);
}

// y[r][o] = x[r] . w[o] for any number of rows and of outputs.
template <bool REST, class X, class T>
INLINE void products(X x, int64_t rows, const T* w, int64_t ins, int outs, float* y, const char* ahead) {
    if (rows >= TILE_ROWS) tiles<TILE_ROWS, true, REST>(x, w, ins, outs, y, ahead);
    int64_t r = TILE_ROWS;
    for (; r + TILE_ROWS <= rows; r += TILE_ROWS)
        tiles<TILE_ROWS, false, REST>(x.from(r), w, ins, outs, y + r * STRIP, ahead);
    r = rows / TILE_ROWS * TILE_ROWS;
    x = x.from(r), y += r * STRIP;
    if (rows - r == 3) tiles<3, true, REST>(x, w, ins, outs, y, ahead);
    if (rows - r == 2) tiles<2, true, REST>(x, w, ins, outs, y, ahead);
    if (rows - r == 1) tiles<1, true, REST>(x, w, ins, outs, y, ahead);
}

template <class T>
inline void products(const float* const* x, int64_t rows, const T* w, int64_t ins, int outs, float* y,
                     const char* ahead) {
    if (ins % LANES) products<true>(Pointed{x}, rows, w, ins, outs, y, ahead);
    else products<false>(Pointed{x}, rows, w, ins, outs, y, ahead);
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
inline void tile_products(const bf16* packed, int count, const bf16* w, int64_t ins, int outs, float* y,
                          const bf16* ahead) {
    const int64_t half = TILE_INS * count, next = 2 * ins * count;
    configure_tiles(outs, count);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t d = 0; d < ins; d += TILE_INS, packed += 2 * half) {
        for (int o = 0; ahead && o < outs; o++) __builtin_prefetch(ahead + o * ins + d);
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
template <bool PAIR> inline void tile_products(const bf16*, int, const bf16*, int64_t, int, float*, const bf16*) {}
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

inline const char* row_of(const Matrix& m, int64_t row) {
    constexpr int64_t sizes[] = {4, 2, 1};
    return static_cast<const char*>(m.data) + row * m.ins * sizes[m.type];
}

// Outputs `begin` to `begin + count` of a matrix, into y (rows, STRIP). `ahead`: what this thread reads next.
inline void strip(const Matrix& m, const Rows& rows, int64_t begin, int count, float* y, const char* ahead) {
    if (rows.packed) {
        const bf16* w = static_cast<const bf16*>(m.data) + begin * m.ins;
#ifdef __AVX512BF16__
        if (!AMX)
            return products<false>(Paired{rows.packed, m.ins}, rows.count, w, m.ins, count, y, ahead);
#endif
        int64_t r = 0;
        auto next = reinterpret_cast<const bf16*>(ahead);
        for (; r + 32 <= rows.count; r += 32, next = nullptr)
            tile_products<true>(rows.packed + 2 * r * m.ins, 16, w, m.ins, count, y + r * STRIP, next);
        for (; r < rows.count; r += 16, next = nullptr) {
            int most = std::min<int64_t>(16, rows.count - r);
            tile_products<false>(rows.packed + 2 * r * m.ins, most, w, m.ins, count, y + r * STRIP, next);
        }
        return;
    }
    typed(m.type, m.data, [&](auto* w) {
        products(rows.x, rows.count, w + begin * m.ins, m.ins, count, y, ahead);
    });
    if (m.scales)
        for (int64_t r = 0; r < rows.count; r++)
            for (int o = 0; o < count; o++) y[r * STRIP + o] *= m.scales[begin + o];
}

// ---------------------------------------------------------------------------------------------------------------------
// One pass. All members but `prepare` are called by every thread of the team. Each does its share of a step, then all
// meet, unless what follows can do without. With few rows, what is cheaper than a meeting is done by every thread for
// itself.

struct Share {
    int64_t from, to;

    static Share of(int64_t count) {
        const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
        return {count * me / team, count * (me + 1) / team};
    }
};

// Where threads wait for each other: a tenth of a microsecond where GCC's barrier, which always calls the system, takes
// three.
class Meeting {
    alignas(64) std::atomic<unsigned> arrived{0};
    alignas(64) std::atomic<unsigned> round{0};
    static constexpr int PATIENCE = 1 << 11;  // looks before a thread sleeps: others may want the core

  public:
    void wait() {
        const unsigned now = round.load(std::memory_order_relaxed), team = omp_get_num_threads();
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == team) {
            arrived.store(0, std::memory_order_relaxed);
            round.store(now + 1);  // seen by all before it is looked who sleeps
            round.notify_all();
            return;
        }
        for (int looks = 0; round.load(std::memory_order_acquire) == now; looks++)
            if (looks < PATIENCE) relax();
            else round.wait(now, std::memory_order_acquire);
    }

  private:
    static void relax() {
#ifdef __x86_64__
        __builtin_ia32_pause();
#endif
    }
};

struct Buffers {  // kept from pass to pass
    std::vector<float> x, heads, gates, attended, scores, weights, active, joint, shared_active, cos, sin;
    std::vector<float> states, logits;
    std::vector<int32_t> chosen;
    alignas(64) std::atomic<int64_t> taken;  // tasks of attention that some thread does or has done
    Meeting meeting;
};

thread_local Buffers kept;  // of the thread that calls

// What each thread works out for itself.
struct Own {
    std::vector<float> x, joint, scores, turned;
    std::vector<int32_t> groups;                         // the first rows of what attends together, and the end of all
    std::vector<int32_t> experts, start, entry, filled;  // the experts that are chosen, and by which rows
};

thread_local Own own;

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
        grow(b.active, rows * layer.top_k * layer.routed.hidden);
        grow(b.cos, model.rope_count * rope_stride);
        grow(b.sin, model.rope_count * rope_stride);
    }

    void meet() { b.meeting.wait(); }

    bool few() const { return rows <= FEW; }

    static constexpr int64_t FEW = 8;

    struct Product {  // y (rows, outs) = x m^T; `add` adds to what y holds
        const Matrix& m;
        float* y = nullptr;
        bool add = false;
    };

    // Products with the same x, shared out as one list of strips. `next`: what this thread reads when they are done.
    void multiply(const float* x, std::initializer_list<Product> list, const char* next) {
        const Share mine = Share::of(strips(list));
        const Matrix* prepared = nullptr;
        Rows ready{};
        float* sums = grow(part, rows * STRIP);
        for (int64_t i = mine.from; i < mine.to; i++) {
            const auto [m, y, add, begin] = at(list, i);
            if (m != prepared) ready = Rows::of(*m, x, rows), prepared = m;
            const int outs = std::min<int64_t>(STRIP, m->outs - begin);
            strip(*m, ready, begin, outs, sums, i + 1 < mine.to ? start_of(list, i + 1) : next);
            for (int64_t n = 0; n < rows; n++)
                for (int o = 0; o < outs; o++) {
                    float& target = y[n * m->outs + begin + o];
                    target = add ? target + sums[n * STRIP + o] : sums[n * STRIP + o];
                }
        }
        meet();
    }

    // Number i of all strips of some products: their matrix and result, and the first output.
    static std::tuple<const Matrix*, float*, bool, int64_t> at(std::initializer_list<Product> list, int64_t i) {
        const Product* product = list.begin();
        for (; i >= strips(product->m.outs); product++) i -= strips(product->m.outs);
        return {&product->m, product->y, product->add, i * STRIP};
    }

    static const char* start_of(std::initializer_list<Product> list, int64_t i) {
        const auto [m, y, add, begin] = at(list, i);
        return row_of(*m, begin);
    }

    // Where this thread begins with products.
    static const char* start_of(std::initializer_list<Product> list) {
        const int64_t all = strips(list);
        return start_of(list, std::min(Share::of(all).from, all - 1));
    }

    const char* start_of(const Layer& layer) const { return start_of({{layer.qkv}, {layer.gate}}); }

    // Where this thread begins with `hidden`, if that is in the shared MLP: which experts are chosen is not known yet.
    const char* start_of_hidden(const Layer& layer) const {
        const int64_t shared = strips(layer.shared.hidden);
        const int64_t experts = std::min<int64_t>(layer.experts, rows * layer.top_k);
        const int64_t from = Share::of(shared + experts * strips(layer.routed.hidden)).from;
        return gate_of(layer, from < shared ? from : 0);
    }

    static int64_t strips(std::initializer_list<Product> list) {
        int64_t all = 0;
        for (const Product& product : list) all += strips(product.m.outs);
        return all;
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

    // The rows of h, normed; with `picked`, those rows of it.
    const float* normed(const Matrix& weight, const int32_t* picked = nullptr) {
        float* x = few() ? grow(own.x, rows * D) : b.x.data();
        const Share mine = few() ? Share{0, rows} : Share::of(rows);
        for (int64_t n = mine.from; n < mine.to; n++) norm(h + (picked ? picked[n] : n) * D, weight, D, x + n * D);
        if (!few()) meet();
        return x;
    }

    void embed(int64_t row, float* y) const {
        typed(model.embedding.type, model.embedding.data, [&](auto* table) {
            auto* from = table + batch.tokens[row] * D;
            float scale = model.embedding.scales ? model.embedding.scales[batch.tokens[row]] : 1.0f;
            for (int64_t d = 0; d < D; d++) y[d] = widen(from[d]) * scale;
        });
    }

    void angles() {
        const Share mine = Share::of(rows);
        for (int r = 0; r < model.rope_count; r++)
            for (int64_t n = mine.from; n < mine.to; n++)
                for (int64_t j = 0; j < model.ropes[r].half; j++) {
                    float angle = float(batch.positions[n]) * model.ropes[r].frequencies[j];
                    b.cos[r * rope_stride + n * half_stride + j] = std::cos(angle);
                    b.sin[r * rope_stride + n * half_stride + j] = std::sin(angle);
                }
    }

    // `next`: what this thread reads when the layer is done.
    void block(const Layer& layer, const char* next) {
        const float* x = normed(layer.attention_norm);
        if (!omp_get_thread_num()) b.taken.store(0, std::memory_order_relaxed);
        multiply(x, {{layer.qkv, b.heads.data()}, {layer.gate, b.gates.data()}}, start_of({{layer.out}}));
        store_heads(layer);
        attention(layer);
        const char* then = layer.experts ? start_of({{layer.router}}) : start_of_hidden(layer);
        multiply(b.attended.data(), {{layer.out, h, true}}, then);
        x = normed(layer.ffn_norm);
        if (layer.experts) route(layer, x);
        hidden(layer, x);
        down(layer, next);
    }

    // Norm and rotate queries in place; keys and values go to the cache.
    void store_heads(const Layer& layer) {
        int64_t C = layer.head_dim, H = layer.heads, K = layer.kv_heads, all = H + 2 * K;
        const int32_t** tables = layer.window ? batch.window : batch.full;
        int64_t half = model.ropes[layer.rope].half;
        const Share mine = Share::of(rows * all);
        for (int64_t i = mine.from; i < mine.to; i++) {
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
        meet();
    }

    void attention(const Layer& layer) {
        const int64_t K = layer.kv_heads, team = omp_get_num_threads();
        const int64_t together = std::max<int64_t>(1, std::min(MOST_QUERIES * K / layer.heads, rows * K / team));
        own.groups.clear();
        for (int64_t n = 0; n < rows; n++)
            if (!n || batch.request[n] != batch.request[n - 1] || n - own.groups.back() == together)
                own.groups.push_back(n);
        const int64_t tasks = own.groups.size() * K;
        own.groups.push_back(rows);
        for (int64_t i; (i = b.taken.fetch_add(1, std::memory_order_relaxed)) < tasks;)
            cached(model.cache_type, layer.keys, [&](auto* keys) {
                const int64_t begin = own.groups[i / K], end = own.groups[i / K + 1];
                attend(layer, begin, end, i % K, keys, static_cast<decltype(keys)>(layer.values));
            });
        meet();
    }

    static constexpr int CHUNK = 128;         // keys whose weights are worked out together
    static constexpr int MOST_QUERIES = 64;  // that read keys together; `program.py` keeps a kv head's within it

    // The query heads that share one kv head, of rows `begin` to `end`, which follow each other in one request: over
    // all visible blocks, with a running softmax. Keys that a row may not see count zero for it if they are finite.
    template <class T>
    void attend(const Layer& layer, int64_t begin, int64_t end, int64_t kv, const T* keys, const T* values) {
        const int64_t C = layer.head_dim, stride = layer.kv_heads * C, group = layer.heads / layer.kv_heads;
        const int64_t queries = (end - begin) * group;
        const int64_t from = first_visible(layer, batch.positions[begin]), to = batch.positions[end - 1] + 1;
        const int32_t* table = (layer.window ? batch.window : batch.full)[batch.request[begin]];
        const float scale = 1.0f / std::sqrt(float(C));
        const float* q[MOST_QUERIES];
        float *out[MOST_QUERIES], *scores = grow(own.scores, queries * CHUNK), *turned = grow(own.turned, C * LANES);
        float top[MOST_QUERIES];
        Floats totals[MOST_QUERIES];
        for (int64_t i = 0; i < queries; i++) {
            const int64_t n = begin + i / group, head = kv * group + i % group;
            q[i] = &b.heads[n * layer.qkv.outs + head * C];
            out[i] = &b.attended[(n * layer.heads + head) * C];
            std::fill_n(out[i], C, 0.0f);
            top[i] = -INFINITY, totals[i] = Floats{};
        }
        auto fetch_chunk = [&](int64_t chunk) {
            for (int64_t block = std::max(from, chunk) / BLOCK; block * BLOCK < std::min(to, chunk + CHUNK); block++)
                for (int64_t i = 0; i < BLOCK; i++) {
                    const int64_t place = (table[block] * BLOCK + i) * stride + kv * C;
                    fetch(keys + place, C);
                    fetch(values + place, C);
                }
        };
        fetch_chunk(from / CHUNK * CHUNK);
        for (int64_t chunk = from / CHUNK * CHUNK; chunk < to; chunk += CHUNK) {
            const T* rows_of_values[CHUNK / BLOCK];
            fetch_chunk(chunk + CHUNK);
            const int start = std::max(from - chunk, int64_t(0)), stop = std::min<int64_t>(to - chunk, CHUNK);
            for (int s = start / BLOCK * BLOCK; s < stop; s += BLOCK) {
                const int64_t block = (chunk + s) / BLOCK, place = table[block] * BLOCK * stride + kv * C;
                rows_of_values[s / BLOCK] = values + place;
                for (int half = 0; half < BLOCK; half += LANES) {
                    turn(keys + place + half * stride, stride, C, turned);
                    by_fours(queries, [&](int64_t i, auto count) {
                        score<count>(q + i, turned, C, scores + i * CHUNK + s + half);
                    });
                }
            }
            for (int64_t i = 0; i < queries; i++) {
                const int64_t last = batch.positions[begin + i / group], first = first_visible(layer, last);
                const int seen = std::clamp<int64_t>(first - chunk, start, stop);
                const int hidden = std::clamp<int64_t>(last + 1 - chunk, start, stop);
                soften(scores + i * CHUNK, start, stop, seen, hidden, scale, top[i], totals[i], out[i], C);
            }
            by_fours(queries, [&](int64_t i, auto count) {
                int64_t c = 0;
                for (; c + 2 * LANES <= C; c += 2 * LANES)
                    weigh<count, 2>(rows_of_values, start, stop, stride, scores + i * CHUNK, out + i, c);
                for (; c + LANES <= C; c += LANES)
                    weigh<count, 1>(rows_of_values, start, stop, stride, scores + i * CHUNK, out + i, c);
                for (; c < C; c++)
                    for (int s = start; s < stop; s++) {
                        const float value = widen(rows_of_values[s / BLOCK][s % BLOCK * stride + c]);
                        for (int64_t j = i; j < i + count; j++)
                            out[j][c] = std::fma(scores[j * CHUNK + s], value, out[j][c]);
                    }
            });
        }
        for (int64_t i = 0; i < queries; i++) {
            const int64_t n = begin + i / group, head = kv * group + i % group;
            const float factor = sigmoid(b.gates[n * layer.heads + head]) / total(totals[i]);
            for (int64_t c = 0; c < C; c++) out[i][c] *= factor;
        }
    }

    int64_t first_visible(const Layer& layer, int64_t position) const {
        return std::max<int64_t>(batch.first, layer.window ? position - layer.window + 1 : 0);
    }

    // Calls f with the first of up to four things, and with how many there are, a constant.
    template <class F> static void by_fours(int64_t count, F f) {
        int64_t i = 0;
        for (; i + 4 <= count; i += 4) f(i, std::integral_constant<int, 4>{});
        if (count - i == 3) f(i, std::integral_constant<int, 3>{});
        if (count - i == 2) f(i, std::integral_constant<int, 2>{});
        if (count - i == 1) f(i, std::integral_constant<int, 1>{});
    }

    // turned (C, LANES) = LANES keys, one a column.
    template <class T> static void turn(const T* keys, int64_t stride, int64_t C, float* turned) {
        int64_t c = 0;
        for (; c + LANES <= C; c += LANES)
            transposed([&](auto i) INLINED { return load(keys + i * stride + c); },
                       [&](auto i, Floats v) INLINED { store(turned + (c + i) * LANES, v); });
        for (; c < C; c++)
            for (int i = 0; i < LANES; i++) turned[c * LANES + i] = widen(keys[i * stride + c]);
    }

    // Scores of LANES keys for COUNT queries, CHUNK apart.
    template <int COUNT> static void score(const float* const* q, const float* turned, int64_t C, float* scores) {
        Floats sums[COUNT];
        unrolled<COUNT>([&](auto i) INLINED { sums[i] = Floats{}; });
        for (int64_t c = 0; c < C; c++) {
            const Floats key = load(turned + c * LANES);
            unrolled<COUNT>([&](auto i) INLINED { sums[i] = multiply_add(spread(q[i][c]), key, sums[i]); });
        }
        unrolled<COUNT>([&](auto i) INLINED { store(scores + i * CHUNK, sums[i]); });
    }

    // Turn a chunk's scores into weights relative to the running maximum `top`; what was summed before is scaled to it.
    // Weights from `start` to `stop` are set, those before `seen` and from `hidden` on to zero.
    static void soften(float* scores, int start, int stop, int seen, int hidden, float scale, float& top,
                       Floats& totals, float* out, int64_t size) {
        const int from = start / LANES * LANES, to = (stop + LANES - 1) / LANES * LANES;
        for (int s = from; s < seen; s++) scores[s] = -INFINITY;
        for (int s = hidden; s < to; s++) scores[s] = -INFINITY;
        Floats most = Floats{} - INFINITY;
        for (int s = from; s < to; s += LANES) most = larger(most, load(scores + s));
        const float highest = largest(most) * scale;
        if (highest > top) {
            const float shrink = top == -INFINITY ? 0.0f : exponential(top - highest);
            for (int64_t c = 0; c < size; c++) out[c] *= shrink;
            totals *= shrink;
            top = highest;
        }
        for (int s = from; s < to; s += LANES) {
            const Floats x = load(scores + s) * scale - top;
            const Floats weights = x > -87.0f ? exponential(x) : Floats{};  // also for NaN: no key was visible yet
            totals += weights;
            store(scores + s, weights);
        }
    }

    // COUNT outputs, from column c on, += weights of the keys from `start` to `stop` times their values.
    template <int COUNT, int VECTORS, class T>
    static void weigh(const T* const* blocks, int start, int stop, int64_t stride, const float* weights,
                      float* const* out, int64_t c) {
        Floats sums[COUNT * VECTORS];
        unrolled<COUNT * VECTORS>([&](auto i) INLINED { sums[i] = load(out[i / VECTORS] + c + i % VECTORS * LANES); });
        for (int s = start; s < stop; s++) {
            const T* at = blocks[s / BLOCK] + s % BLOCK * stride + c;
            Floats value[VECTORS];
            unrolled<VECTORS>([&](auto i) INLINED { value[i] = load(at + i * LANES); });
            unrolled<COUNT * VECTORS>([&](auto i) INLINED {
                sums[i] = multiply_add(spread(weights[i / VECTORS * CHUNK + s]), value[i % VECTORS], sums[i]);
            });
        }
        unrolled<COUNT * VECTORS>([&](auto i) INLINED { store(out[i / VECTORS] + c + i % VECTORS * LANES, sums[i]); });
    }

    // Choose each row's experts and weigh them.
    void route(const Layer& layer, const float* x) {
        const int64_t E = layer.experts, top_k = layer.top_k;
        multiply(x, {{layer.router, b.scores.data()}}, start_of_hidden(layer));
        const Share mine = Share::of(rows);
        for (int64_t n = mine.from; n < mine.to; n++)
            choose(layer, &b.scores[n * E], &b.chosen[n * top_k], &b.weights[n * top_k]);
        meet();
        list(layer);
    }

    // List the rows of each expert that is chosen.
    void list(const Layer& layer) {
        const int64_t E = layer.experts, all = rows * layer.top_k;
        int32_t *start = grow(own.start, E + 1), *entry = grow(own.entry, all), *filled = grow(own.filled, E);
        std::fill_n(start, E + 1, 0);
        for (int64_t i = 0; i < all; i++) start[b.chosen[i] + 1]++;
        own.experts.clear();
        for (int64_t e = 0; e < E; e++) {
            if (start[e + 1]) own.experts.push_back(e);
            filled[e] = start[e], start[e + 1] += start[e];
        }
        for (int64_t i = 0; i < all; i++) entry[filled[b.chosen[i]]++] = i;
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
    void hidden(const Layer& layer, const float* x) {
        const int64_t I = layer.routed.hidden, shared = strips(layer.shared.hidden), per_expert = strips(I);
        const Share mine = Share::of(shared + (layer.experts ? own.experts.size() * per_expert : 0));
        int64_t prepared = -1;  // whose rows are ready: 0 for the shared MLP, 1 for the first chosen expert, ...
        Rows ready{};
        for (int64_t task = mine.from; task < mine.to; task++) {
            const int64_t number = task < shared ? 0 : 1 + (task - shared) / per_expert;
            const int64_t e = number ? own.experts[number - 1] : 0, start = number ? own.start[e] : 0;
            if (number != prepared) ready = number ? rows_of(layer, e, x) : Rows::of(layer.shared.gate_up, x, rows);
            prepared = number;
            const char* next = task + 1 < mine.to ? gate_of(layer, task + 1) : start_of({{layer.shared.down}});
            if (number) swiglu(layer.routed, e, (task - shared) % per_expert, ready, &b.active[start * I], next);
            else swiglu(layer.shared, 0, task, ready, b.shared_active.data(), next);
        }
        meet();
    }

    // The rows that have chosen expert e.
    Rows rows_of(const Layer& layer, int64_t e, const float* x) const {
        int64_t start = own.start[e], count = own.start[e + 1] - start;
        const float** chosen = grow(row_pointers, count);
        for (int64_t i = 0; i < count; i++) chosen[i] = x + own.entry[start + i] / layer.top_k * D;
        return Rows::of(layer.routed.gate_up, chosen, count);
    }

    // Where a task of `hidden` begins to read.
    static const char* gate_of(const Layer& layer, int64_t task) {
        const int64_t shared = strips(layer.shared.hidden), per_expert = strips(layer.routed.hidden);
        if (task < shared) return row_of(layer.shared.gate_up, task * STRIP);
        const int64_t first = own.experts[(task - shared) / per_expert] * 2 * layer.routed.hidden;
        return row_of(layer.routed.gate_up, first + (task - shared) % per_expert * STRIP);
    }

    // Strip `number` of one expert's activations, into y (count, hidden).
    void swiglu(const Mlp& mlp, int64_t expert, int64_t number, const Rows& rows, float* y, const char* next) {
        int64_t count = rows.count, begin = number * STRIP, first = expert * 2 * mlp.hidden + begin;
        int outs = std::min<int64_t>(STRIP, mlp.hidden - begin);
        float *gate = grow(part, 2 * count * STRIP), *up = gate + count * STRIP;
        strip(mlp.gate_up, rows, first, outs, gate, row_of(mlp.gate_up, first + mlp.hidden));
        strip(mlp.gate_up, rows, first + mlp.hidden, outs, up, next);
        for (int64_t i = 0; i < count; i++) {
            const float *g = gate + i * STRIP, *u = up + i * STRIP;
            float *to = y + i * mlp.hidden + begin, most = mlp.clip > 0 ? mlp.clip : INFINITY;
            for (int o = 0; o < outs; o++)
                to[o] = std::min(g[o] * sigmoid(g[o]), most) * std::min(std::max(u[o], -most), most);
        }
    }

    // h += shared + sum of weight * expert, the experts in the order of their numbers; each thread has its own columns.
    void down(const Layer& layer, const char* next) {
        const int64_t I = layer.routed.hidden, count = layer.experts ? own.experts.size() : 0;
        const Share mine = Share::of(strips(D));
        auto start_of_expert = [&](int64_t i) {
            return i < count ? row_of(layer.routed.down, own.experts[i] * D + mine.from * STRIP) : next;
        };
        const Rows shared = Rows::of(layer.shared.down, b.shared_active.data(), rows);
        auto whole = [](int64_t n) { return std::pair(n, 1.0f); };
        add_strips(layer.shared.down, shared, 0, mine, start_of_expert(0), whole);
        for (int64_t i = 0; i < count; i++) {
            const int64_t e = own.experts[i], start = own.start[e];
            const Rows x = Rows::of(layer.routed.down, &b.active[start * I], own.start[e + 1] - start);
            add_strips(layer.routed.down, x, e * D, mine, start_of_expert(i + 1), [&](int64_t row) {
                int32_t entry = own.entry[start + row];
                return std::pair<int64_t, float>(entry / layer.top_k, b.weights[entry]);
            });
        }
        meet();
    }

    // For each row i of x, add weight * (x m^T) to a row of h: `target` gives both. `first`: the first row of m.
    template <class F>
    void add_strips(const Matrix& m, const Rows& x, int64_t first, Share mine, const char* next, F target) {
        float* sums = grow(part, x.count * STRIP);
        for (int64_t s = mine.from; s < mine.to; s++) {
            int64_t begin = s * STRIP;
            int outs = std::min<int64_t>(STRIP, D - begin);
            strip(m, x, first + begin, outs, sums, s + 1 < mine.to ? row_of(m, first + begin + STRIP) : next);
            for (int64_t i = 0; i < x.count; i++) {
                auto [n, weight] = target(i);
                float* y = h + n * D + begin;
                for (int o = 0; o < outs; o++) y[o] += weight * sums[i * STRIP + o];
            }
        }
    }

    // Keep the states h for the module that reads them.
    void keep(int state) {
        const Share mine = Share::of(rows);
        cached(model.cache_type, model.hidden[state], [&](auto* states) {
            for (int64_t n = mine.from; n < mine.to; n++) {
                auto* to = states + slot(batch.window, n, batch.positions[n]) * D;
                for (int64_t d = 0; d < D; d++) narrow(h[n * D + d], to + d);
            }
        });
    }

    // [norm(embedding); norm(state of the position before)] of each row
    const float* join(int k, const Module& module) {
        float* joint = few() ? grow(own.joint, rows * 2 * D) : b.joint.data();
        const Share mine = few() ? Share{0, rows} : Share::of(rows);
        for (int64_t n = mine.from; n < mine.to; n++) {
            float *embedding = joint + n * 2 * D, *state = embedding + D;
            embed(n, embedding);
            norm(embedding, module.embedding_norm, D, embedding);
            cached(model.cache_type, model.hidden[k], [&](auto* states) {
                auto* from = states + slot(batch.window, n, batch.positions[n] - 1) * D;
                for (int64_t d = 0; d < D; d++) state[d] = widen(from[d]);
            });
            norm(state, module.hidden_norm, D, state);
        }
        if (!few()) meet();
        return joint;
    }

    // h = the trunk's output before the final norm.
    void trunk() {
        const Share mine = Share::of(rows);
        for (int64_t n = mine.from; n < mine.to; n++) embed(n, h + n * D);
        angles();
        meet();
        for (int i = 0, last = model.layer_count - 1; i <= last; i++)
            block(model.layers[i], i < last ? start_of(model.layers[i + 1]) : start_of({{model.head}}));
        if (model.hidden) keep(0);
        release_tiles();
    }

    // h = the output of MTP module k.
    void module(int k) {
        const Module& module = model.modules[k];
        angles();
        multiply(join(k, module), {{module.joint, h}}, start_of(module.layer));
        block(module.layer, start_of({{module.head}}));
        keep(k + 1);
        release_tiles();
    }

    // y (rows, V) = logits of the rows h, or of those picked, of the trunk (k = -1) or of MTP module k. Also each row's
    // likeliest token, the lowest of equals, and its log-probability unless `logprobs` is null. `next`: what this thread
    // reads then.
    void logits(int k, float* y, int32_t* best, float* logprobs, const int32_t* picked, const char* next) {
        const Matrix& head = k < 0 ? model.head : model.modules[k].head;
        multiply(normed(k < 0 ? model.norm : model.modules[k].norm, picked), {{head, y}}, next);
        release_tiles();
        const Share mine = Share::of(rows);
        for (int64_t n = mine.from; n < mine.to; n++) {
            const float* row = y + n * head.outs;
            best[n] = place_of_largest(row, head.outs);
            if (logprobs) logprobs[n] = -std::log(sum_of_exponentials(row, head.outs, row[best[n]]));
        }
    }
};

// What the trunk or a module runs in a pass: of each request some positions; drafts are filled in as they are made.
struct Stage {
    std::vector<int32_t> tokens, positions, request, begin, drafts, picked, best;
    Batch batch, ends;

    // `span` gives a request's first position, the one behind its last, and the first whose logits are wanted.
    template <class F> void fill(const Requests& all, int32_t first, F span) {
        tokens.clear(), positions.clear(), request.clear(), picked.clear();
        begin.resize(all.count), drafts.resize(all.count);
        const int32_t* known = all.tokens;
        for (int32_t r = 0; r < all.count; known += all[r].end - all[r].first, r++) {
            const auto [from, to, wanted] = span(r);
            begin[r] = tokens.size(), drafts[r] = begin[r] + all[r].end - from;
            for (int32_t p = from; p < to; p++) {
                if (p >= wanted) picked.push_back(tokens.size());
                tokens.push_back(p < all[r].end ? known[p - all[r].first] : 0);
                positions.push_back(p), request.push_back(r);
            }
        }
        best.resize(picked.size());
        batch = {tokens.data(), positions.data(), request.data(), all.full, all.window, int32_t(tokens.size()), first};
        ends = {}, ends.rows = picked.size();
    }

    // Take draft k of request r, if it is read here.
    void put(int32_t r, int32_t k, int32_t token) {
        if (drafts[r] + k >= begin[r]) tokens[drafts[r] + k] = token;
    }
};

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

// One pass. Module after module proposes a token behind what is known and proposed so far, for all requests together;
// then the trunk runs over known positions and drafts. h (N, D) = its output before the final norm, y (E, V), best and
// logprobs as `Pass::logits` gives them for what is wanted of it, drafts (requests, modules).
void run(const Model* model, const Requests* all, float* h, float* y, int32_t* best, float* logprobs, int32_t* drafts) {
    int32_t deepest = 0;
    for (int32_t r = 0; r < all->count; r++) deepest = std::max(deepest, (*all)[r].drafts);
    static thread_local std::vector<Stage> kept_stages;  // for their buffers
    std::vector<Stage>& stages = kept_stages;            // by its own name, each thread of the team would see its own
    if (int32_t(stages.size()) <= deepest) stages.resize(deepest + 1);
    for (int32_t k = 0; k < deepest; k++)
        stages[k].fill(*all, k + 1, [&](int32_t r) {
            const Asked& asked = (*all)[r];
            if (asked.drafts <= k) return std::tuple(0, 0, 0);
            return std::tuple(all->start(r, k), asked.end + k, asked.end + k - 1);
        });
    stages[deepest].fill(*all, 0, [&](int32_t r) {
        const Asked& asked = (*all)[r];
        const int32_t to = asked.end + asked.drafts;
        return std::tuple(asked.start, to, asked.ready ? asked.end - 1 : to);
    });
    for (int32_t k = 0; k < deepest; k++) {
        grow(kept.states, stages[k].batch.rows * model->embedding.ins);
        grow(kept.logits, stages[k].ends.rows * model->head.outs);
        grow(kept.joint, stages[k].batch.rows * 2 * model->embedding.ins);
    }
    float *states = kept.states.data(), *scores = kept.logits.data();
    std::vector<Pass> bodies, heads;
    for (int32_t k = 0; k <= deepest; k++) {
        float* own = k < deepest ? states : h;
        bodies.push_back(Pass{*model, stages[k].batch, kept, own});
        heads.push_back(Pass{*model, stages[k].ends, kept, own});
        if (k < deepest) bodies[k].prepare(model->modules[k].layer);
        else
            for (int i = 0; i < model->layer_count; i++) bodies[k].prepare(model->layers[i]);
    }
    pin(model->threads);
#pragma omp parallel num_threads(model->threads)
    {
        const char* trunk = bodies[deepest].start_of(model->layers[0]);
        for (int32_t k = 0; k < deepest; k++) {
            const char* next = k + 1 < deepest ? Pass::start_of({{model->modules[k + 1].joint}}) : trunk;
            bodies[k].module(k);
            heads[k].logits(k, scores, stages[k].best.data(), nullptr, stages[k].picked.data(), next);
            const Share mine = Share::of(heads[k].rows);  // those that this thread has just found
            for (int64_t i = mine.from; i < mine.to; i++) {
                const int32_t r = stages[k].request[stages[k].picked[i]], token = stages[k].best[i];
                drafts[r * all->modules + k] = token;
                for (int32_t later = k + 1; later < (*all)[r].drafts; later++) stages[later].put(r, k, token);
                stages[deepest].put(r, k, token);
            }
            heads[k].meet();
        }
        bodies[deepest].trunk();
        if (heads[deepest].rows)
            heads[deepest].logits(-1, y, best, logprobs, stages[deepest].picked.data(), trunk);
    }
}

// h (N, D) = the output of MTP module k.
void module(const Model* model, int32_t k, const Batch* batch, float* h) {
    Pass pass{*model, *batch, kept, h};
    pass.prepare(model->modules[k].layer);
    grow(kept.joint, pass.rows * 2 * pass.D);
#pragma omp parallel num_threads(model->threads)
    pass.module(k);
}

// As `Pass::logits`, of outputs h (count, D) of the trunk.
void logits(const Model* model, const float* h, int32_t count, float* y, int32_t* best, float* logprobs) {
    Batch batch{};
    batch.rows = count;
    Pass pass{*model, batch, kept, const_cast<float*>(h)};
    grow(kept.x, count * pass.D);
#pragma omp parallel num_threads(model->threads)
    pass.logits(-1, y, best, logprobs, nullptr, pass.start_of(model->layers[0]));
}
}
