// The projection z = vec(X) phi and its two gradients, for blocks of at most L tokens.
//
// Blocks are floats [tokens][streams][padded], channels padded with zeros to whole vectors, and a few
// floats after every token: rows a power of two apart would meet in few sets of the cache. phi is
// packed as [chunk of L channels][output][L], so that no vector reaches over two streams.

// The memory of the next block, requested line by line while the present one is worked on: many
// requests at once would stand in each other's way.
struct Ahead {
  static constexpr int MOST = 4;
  const char *at = nullptr, *end = nullptr;
  const char *waiting[MOST][2];
  int left = 0;

  template <typename T> MEMBER void add(const T* first, const T* last) {
    waiting[left][0] = (const char*)first;
    waiting[left++][1] = (const char*)last;
  }
  MEMBER void fetch() {
    if (at >= end) {
      if (left == 0) return;
      at = waiting[--left][0], end = waiting[left][1];
    }
    __builtin_prefetch(at, 0, 2);
    at += 64;
  }
};

// A number of chunks that are worked on together, as a type.
template <int V> struct Columns {
  static constexpr int value = V;
};

// phi [segments * channels][O], or its transpose if `by_output`, to packed form; to be called by all
// threads of a team.
template <int O>
static void pack(const float* phi, bool by_output, float* packed, int segments, long channels,
                 long padded) {
#pragma omp for
  for (long chunk = 0; chunk < segments * padded / L; ++chunk) {
    const long segment = chunk * L / padded, c = chunk * L - segment * padded;
    const long first = segment * channels + c;
    const int count = int(channels - c < L ? channels - c : L);
    float* to = packed + chunk * O * L;
    if (by_output)
      for (int o = 0; o < O; ++o) {
        const float* from = phi + o * segments * channels + first;
        store(to + o * L, count == L ? load(from) : load(from, count));
      }
    else
      for (int i = 0; i < L; ++i)
        for (int o = 0; o < O; ++o) to[o * L + i] = i < count ? phi[(first + i) * O + o] : 0.0f;
  }
}

// The inverse of `pack` on the sum of all threads' buffers, added in their order.
template <int O>
static void unpack_sum(const float* packed, long stride, int buffers, float* phi, bool by_output,
                       int segments, long channels, long padded) {
#pragma omp for
  for (long chunk = 0; chunk < segments * padded / L; ++chunk) {
    const long segment = chunk * L / padded, c = chunk * L - segment * padded;
    const long first = segment * channels + c;
    const int count = int(channels - c < L ? channels - c : L);
    vec total[O];
    for (int o = 0; o < O; ++o) {
      total[o] = vec{};
      for (int b = 0; b < buffers; ++b)
        total[o] += load(packed + b * stride + (chunk * O + o) * L);
    }
    if (by_output)
      for (int o = 0; o < O; ++o) {
        float* to = phi + o * segments * channels + first;
        if (count == L)
          store(to, total[o]);
        else
          store(to, total[o], count);
      }
    else
      for (int i = 0; i < count; ++i)
        for (int o = 0; o < O; ++o) phi[(first + i) * O + o] = total[o][i];
  }
}

// Whether a block needs no copy: whole vectors of floats, and all the rows a register tile reads.
template <typename T> INLINE bool in_place(long channels, int count) {
  return sizeof(T) == 4 && channels % L == 0 && count % ROWS == 0;
}

// The rows of a block: one of every token, all its streams, `stride` apart.
struct Rows {
  const float* at;
  long stride;
};

// Zeroes the rows of a block that no token has.
INLINE void clear_after(float* block, long stride, int count) {
  if (count < L) std::memset(block + count * stride, 0, (L - count) * stride * sizeof(float));
}

// A block in the form above: where it stands, or a copy of it in `copy`.
template <typename T>
INLINE Rows staged(const T* from, float* copy, int streams, long channels, long padded,
                   long stride, int count) {
  if (in_place<T>(channels, count)) return {(const float*)from, streams * channels};
  for (int t = 0; t < count; ++t)
    for (int j = 0; j < streams; ++j)
      for_channels(channels, false, [&](long c, auto at) ALWAYS_INLINE {
        store(copy + t * stride + j * padded + c, at.get(from + (t * streams + j) * channels + c));
      });
  clear_after(copy, stride, count);
  return {copy, stride};
}

template <int W, int O, bool FIRST>
static void project_tile(const float* x, long stride, long width, const float* phi, Ahead& ahead,
                         vec (*sums)[L]) {
  vec z[ROWS][W] = {}, squares[ROWS] = {};
  for (long k = 0; k < width; k += L) {
    ahead.fetch();
    vec rows[ROWS];
    UNROLL for (int t = 0; t < ROWS; ++t) rows[t] = load(x + t * stride + k);
    UNROLL for (int o = 0; o < W; ++o) {
      const vec column = load(phi + k * O + o * L);
      UNROLL for (int t = 0; t < ROWS; ++t) z[t][o] += rows[t] * column;
    }
    if (FIRST) UNROLL for (int t = 0; t < ROWS; ++t) squares[t] += rows[t] * rows[t];
  }
  UNROLL for (int t = 0; t < ROWS; ++t) {
    UNROLL for (int o = 0; o < W; ++o) sums[o][t] = z[t][o];
    if (FIRST) sums[O][t] = squares[t];
  }
}

// (14), (15): z = x phi, and the sum of squares, of the rows x[t] of one block.
template <int O>
static void project(const float* x, long stride, long width, int count, const float* phi,
                    Ahead& ahead, vec* z, int step, vec* square) {
  constexpr int FIRST = O < OUTS ? O : OUTS;
  vec sums[O + 1][L];
  if (count < L) std::memset(sums, 0, sizeof sums);
  for (int t = 0; t < count; t += ROWS) {
    const float* rows = x + t * stride;
    project_tile<FIRST, O, true>(rows, stride, width, phi, ahead, (vec(*)[L])&sums[0][t]);
    int o = FIRST;
    for (; o + OUTS <= O; o += OUTS)
      project_tile<OUTS, O, false>(rows, stride, width, phi + o * L, ahead,
                                   (vec(*)[L])&sums[o][t]);
    if constexpr (O > FIRST && O % OUTS != 0)
      project_tile<O % OUTS, O, false>(rows, stride, width, phi + o * L, ahead,
                                       (vec(*)[L])&sums[o][t]);
  }
  for (int o = 0; o < O; ++o) z[o * step] = lane_sums(sums[o]);
  *square = lane_sums(sums[O]);
}

template <int V, int W, int O>
INLINE void phi_tile(const float* x, long stride, int count, const float* dz, float* dphi,
                     Ahead& ahead) {
  vec sums[V][W] = {};
  for (int t = 0; t < count; ++t) {
    ahead.fetch();
    vec columns[V];
    UNROLL for (int v = 0; v < V; ++v) columns[v] = load(x + t * stride + v * L);
    UNROLL for (int o = 0; o < W; ++o) {
      UNROLL for (int v = 0; v < V; ++v) sums[v][o] += columns[v] * dz[t * O + o];
    }
  }
  UNROLL for (int v = 0; v < V; ++v) {
    UNROLL for (int o = 0; o < W; ++o) {
      float* to = dphi + (v * O + o) * L;
      store(to, load(to) + sums[v][o]);
    }
  }
}

// dphi += x^T dz over the tokens of a block, for V chunks.
template <int V, int O>
static void add_phi_gradient(const float* x, long stride, int count, const float* dz, float* dphi,
                             Ahead& ahead) {
  int o = 0;
  for (; o + OUTS <= O; o += OUTS)
    phi_tile<V, OUTS, O>(x, stride, count, dz + o, dphi + o * L, ahead);
  if constexpr (O % OUTS != 0)
    phi_tile<V, O % OUTS, O>(x, stride, count, dz + o, dphi + o * L, ahead);
}

// dx = dz phi^T + shrink x + weight du for V chunks: through the product, the norm, the pre-mix;
// plus `more` if MORE. If `alone`, without `add_phi_gradient`, it fetches for both.
template <int V, int O, bool MORE>
static void state_gradient(Rows x, Rows du, Rows more, int count, const float* phi,
                           const float* dz, vec shrink, vec weight, float* dx, long dx_stride,
                           bool streamed, bool alone, Ahead& ahead) {
  for (int t = 0; t < count; t += ROWS) {
    vec sums[ROWS][V];
    UNROLL for (int r = 0; r < ROWS; ++r) {
      UNROLL for (int v = 0; v < V; ++v) {
        sums[r][v] = shrink[t + r] * load(x.at + (t + r) * x.stride + v * L) +
                     weight[t + r] * load(du.at + (t + r) * du.stride + v * L);
        if (MORE) sums[r][v] += load(more.at + (t + r) * more.stride + v * L);
      }
    }
    for (int o = 0; o < O; ++o) {
      ahead.fetch();
      if (alone) ahead.fetch();
      UNROLL for (int v = 0; v < V; ++v) {
        const vec column = kept(load(phi + (v * O + o) * L));
        UNROLL for (int r = 0; r < ROWS; ++r) sums[r][v] += dz[(t + r) * O + o] * column;
      }
    }
    UNROLL for (int r = 0; r < ROWS; ++r) {
      UNROLL for (int v = 0; v < V; ++v) {
        float* to = dx + (t + r) * dx_stride + v * L;
        if (streamed)
          stream(to, sums[r][v]);
        else
          store(to, sums[r][v]);
      }
    }
  }
}
