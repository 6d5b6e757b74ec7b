// What every generated source starts with: vectors of L floats, and the loops over them whose text
// does not depend on the site. A vector holds L channels of one token, or one coefficient of L
// tokens.
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef _OPENMP
#include <omp.h>
#endif

#define ALWAYS_INLINE __attribute__((always_inline))
#define MEMBER inline ALWAYS_INLINE
#define INLINE static MEMBER
#define UNROLL _Pragma("GCC unroll 32")  // GCC keeps arrays in registers only where loops vanish

// L is the processor's own width: wider vectors work, but GCC takes them apart badly.
//
// Register tiles: ROWS x OUTS accumulators (projection), ROWS x COLS (gradient of the state),
// COLS x OUTS (gradient of phi). ROWS divides L.
#if defined(__AVX512F__)
constexpr int L = 16, ROWS = 4, OUTS = 6, COLS = 4;
#elif defined(__AVX__)
constexpr int L = 8, ROWS = 4, OUTS = 3, COLS = 3;
#elif defined(__aarch64__)
constexpr int L = 4, ROWS = 4, OUTS = 6, COLS = 4;
#else
constexpr int L = 4, ROWS = 4, OUTS = 3, COLS = 3;
#endif
typedef float vec __attribute__((vector_size(4 * L)));
typedef int32_t ivec __attribute__((vector_size(4 * L)));
typedef uint32_t uvec __attribute__((vector_size(4 * L)));
typedef uint16_t hvec __attribute__((vector_size(2 * L)));

// Stays in a register, where GCC would rather load it again for every use.
INLINE vec kept(vec v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

struct bf16 {
  uint16_t bits;
};

struct half {
  uint16_t bits;
};

INLINE vec load(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

INLINE vec load(const bf16* p) {
  hvec v;
  std::memcpy(&v, p, sizeof v);
  return (vec)(__builtin_convertvector(v, uvec) << 16);
}

INLINE vec half_value(uvec bits) {  // the exponent's bias differs by 112
  const uvec magnitude = (bits & 0x7fff) << 13;
  const vec finite = (vec)magnitude * 0x1p112f;
  const uvec value = magnitude < (0x7c00u << 13) ? (uvec)finite : magnitude | 0x7f800000;
  return (vec)(value | (bits & 0x8000) << 16);
}

INLINE vec load(const half* p) {
  hvec v;
  std::memcpy(&v, p, sizeof v);
  return half_value(__builtin_convertvector(v, uvec));
}

INLINE void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }

INLINE uvec bf16_bits(vec v) {  // to nearest, ties to even; a NaN stays one
  const uvec bits = (uvec)v;
  const uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return v == v ? rounded : (bits >> 16) | 0x40;
}

INLINE void store(bf16* p, vec v) {
  const hvec h = __builtin_convertvector(bf16_bits(v), hvec);
  std::memcpy(p, &h, sizeof h);
}

INLINE uvec half_bits(vec v) {  // to nearest, ties to even; a NaN stays one
  const uvec sign = (uvec)v >> 16 & 0x8000, a = (uvec)v & 0x7fffffff;
  // Below 2^-14 the steps are those of floats around 1/2.
  const uvec small = (uvec)((vec)a + 0.5f) - 0x3f000000;
  const uvec normal = ((a + 0xfff + (a >> 13 & 1)) >> 13) - (112 << 10);
  uvec h = a < 0x38800000 ? small : normal;
  h = a >= 0x477ff000 ? uvec{} + 0x7c00 : h;
  h = a > 0x7f800000 ? uvec{} + 0x7e00 : h;
  return h | sign;
}

INLINE void store(half* p, vec v) {
  const hvec h = __builtin_convertvector(half_bits(v), hvec);
  std::memcpy(p, &h, sizeof h);
}

// What a reader gets of a value that is stored as a T.
template <typename T> INLINE vec rounded(vec v);
template <> MEMBER vec rounded<float>(vec v) { return v; }
template <> MEMBER vec rounded<bf16>(vec v) { return (vec)(bf16_bits(v) << 16); }
template <> MEMBER vec rounded<half>(vec v) { return half_value(half_bits(v)); }

// Past the caches, for what is not read again soon: the line is not fetched before it is written.
INLINE void stream(float* p, vec v) {
#if defined(__clang__)
  __builtin_nontemporal_store(v, (vec*)p);
#elif defined(__AVX512F__)
  __builtin_ia32_movntps512(p, v);
#elif defined(__AVX__)
  __builtin_ia32_movntps256(p, v);
#else
  store(p, v);
#endif
}

INLINE void stream(bf16* p, vec v) { store(p, v); }
INLINE void stream(half* p, vec v) { store(p, v); }

// Streamed stores are weakly ordered: other threads see them only after this.
INLINE void finish_streams() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

// The last channels of a row, fewer than L; zero beyond them.
template <typename T> INLINE vec load(const T* p, int count) {
  T part[L] = {};
  std::memcpy(part, p, count * sizeof(T));
  return load(part);
}

template <typename T> INLINE void store(T* p, vec v, int count) {
  T part[L];
  store(part, v);
  std::memcpy(p, part, count * sizeof(T));
}

// How one step of `for_channels` reaches its channels: a whole vector, one whose results are
// streamed, or the last few channels of a row.
struct Whole {
  // Also requests the same channels of the next token: rows are too short for the processor to
  // see by itself where they go on.
  template <typename T> MEMBER vec get_next(const T* p, long apart) const {
    __builtin_prefetch(p + apart, 0, 2);
    return load(p);
  }
  template <typename T> INLINE vec get(const T* p) { return load(p); }
  template <typename T> INLINE void put(T* p, vec v) { store(p, v); }
  template <typename T> INLINE void put_far(T* p, vec v) { store(p, v); }
  INLINE vec only(vec v) { return v; }
};

struct Streamed : Whole {
  template <typename T> INLINE void put_far(T* p, vec v) { stream(p, v); }
};

struct Part {
  int count;
  template <typename T> MEMBER vec get_next(const T* p, long) const { return load(p, count); }
  template <typename T> MEMBER vec get(const T* p) const { return load(p, count); }
  template <typename T> MEMBER void put(T* p, vec v) const { store(p, v, count); }
  template <typename T> MEMBER void put_far(T* p, vec v) const { store(p, v, count); }
  MEMBER vec only(vec v) const {  // zero where the row has no channel
    float part[L];
    store(part, v);
    return load(part, count);
  }
};

// Calls step(channel, access) for all vectors of a row.
template <typename Step> INLINE void for_channels(long channels, bool far, Step step) {
  long c = 0;
  if (far)
    for (; c + L <= channels; c += L) step(c, Streamed());
  else
    for (; c + L <= channels; c += L) step(c, Whole());
  if (c < channels) step(c, Part{int(channels - c)});
}

// Streaming pays for results that no cache holds until they are read again, and needs alignment.
template <typename T> INLINE bool far(const T* out, long tokens, long row) {
  return sizeof(T) == 4 && tokens * row >= (1 << 20) && row % L == 0 && (uintptr_t)out % 64 == 0;
}

constexpr long padded_to_vectors(long count) { return (count + L - 1) / L * L; }

INLINE vec splat(float x) { return vec{} + x; }
INLINE vec max(vec a, vec b) { return a > b ? a : b; }

// e^x = 2^k e^r with |r| <= ln(2) / 2 and a Taylor polynomial: within 2 units in the last place.
// Below -87 the result stays at the smallest normal numbers; NaN stays NaN.
INLINE vec exp(vec x) {
  x = x < -87.0f ? splat(-87.0f) : x;
  x = x > 88.0f ? splat(88.0f) : x;
  const vec shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer part in low bits
  const vec k = shifted - 12582912.0f;
  const vec r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  vec p = r * (1.0f / 5040) + (1.0f / 720);
  p = p * r + (1.0f / 120);
  p = p * r + (1.0f / 24);
  p = p * r + (1.0f / 6);
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  return x == x ? (vec)((ivec)p + ((ivec)shifted << 23)) : x;
}

INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + exp(-x)); }

INLINE vec sqrt(vec x) {
  UNROLL for (int i = 0; i < L; ++i) x[i] = std::sqrt(x[i]);
  return x;
}

INLINE vec tanh(vec x) {
  for (int i = 0; i < L; ++i) x[i] = std::tanh(x[i]);
  return x;
}

INLINE float sum(vec v) {
  UNROLL for (int half = L / 2; half; half /= 2)
    UNROLL for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}

// The sums of L vectors, in the lanes of one; for L = 16 by adding two halves 15 times.
INLINE vec lane_sums(vec* v) {
#if defined(__AVX512F__)
  UNROLL for (int i = 0; i < 8; ++i)
    v[i] = __builtin_shufflevector(v[i], v[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21,
                                   22, 23) +
           __builtin_shufflevector(v[i], v[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28,
                                   29, 30, 31);
  UNROLL for (int i = 0; i < 4; ++i)
    v[i] = __builtin_shufflevector(v[i], v[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25,
                                   26, 27) +
           __builtin_shufflevector(v[i], v[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28,
                                   29, 30, 31);
  UNROLL for (int i = 0; i < 2; ++i)
    v[i] = __builtin_shufflevector(v[i], v[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13,
                                   28, 29) +
           __builtin_shufflevector(v[i], v[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14,
                                   15, 30, 31);
  return __builtin_shufflevector(v[0], v[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14,
                                 30) +
         __builtin_shufflevector(v[0], v[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15,
                                 31);
#else
  vec total;
  UNROLL for (int i = 0; i < L; ++i) total[i] = sum(v[i]);
  return total;
#endif
}

// Token-major memory [tokens][stride] from and to vectors over L tokens, of which count exist.
template <int WIDTH> INLINE void get_lanes(const float* p, int count, vec* v, int stride = WIDTH) {
  for (int i = 0; i < WIDTH; ++i) {
    v[i] = vec{};
    for (int t = 0; t < count; ++t) v[i][t] = p[t * stride + i];
  }
}

template <int WIDTH>
INLINE void put_lanes(float* p, int count, const vec* v, int stride = WIDTH) {
  for (int t = 0; t < count; ++t)
    for (int i = 0; i < WIDTH; ++i) p[t * stride + i] = v[i][t];
}

// The tokens of one thread: a contiguous range of whole blocks.
struct Range {
  long first, last;
};

INLINE int thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

INLINE int team() {
#ifdef _OPENMP
  return omp_get_num_threads();
#else
  return 1;
#endif
}

INLINE Range share(long tokens) {
  const long blocks = (tokens + L - 1) / L, each = blocks / team(), rest = blocks % team();
  const long first = thread() * each + (thread() < rest ? thread() : rest);
  const long last = first + each + (thread() < rest);
  return {first * L, last * L < tokens ? last * L : tokens};
}

// The sums of all threads' own, in their order; to be called by all threads of a team.
static void sum_over_team(const double* own, int count, double* all, float* out) {
  std::memcpy(all + thread() * count, own, count * sizeof(double));
#pragma omp barrier
#pragma omp single
  for (int i = 0; i < count; ++i) {
    double total = 0;
    for (int b = 0; b < team(); ++b) total += all[b * count + i];
    out[i] = float(total);
  }
}
