// mhc::seam_norm and its gradient: a seam that applies the norm which the branch starts with,
// y = (u - mean) r weight + shift, to rows of u that are in the nearest cache. Sums are taken of u as
// it would be stored. weight and shift may be null.

// y in the place of u; leaves r, and the mean if there is one.
static void normalise(stream_t* u, const float* weight, const float* shift, float* statistics,
                      long channels) {
  const float count = float(channels);
  vec total = {}, squares = {};
  if (CENTRED)
    for_channels(channels, false,
                 [&](long c, auto at) ALWAYS_INLINE { total += at.get(u + c); });
  const float mean = CENTRED ? sum(total) / count : 0.0f;
  for_channels(channels, false, [&](long c, auto at) ALWAYS_INLINE {
    const vec v = at.only(at.get(u + c) - mean);
    squares += v * v;
  });
  const float r = 1.0f / std::sqrt(sum(squares) / count + BRANCH_EPS);
  for_channels(channels, false, [&](long c, auto at) ALWAYS_INLINE {
    vec y = (at.get(u + c) - mean) * r;
    if (ROUNDS) y = rounded<stream_t>(y);
    if (weight) y = y * at.get(weight + c);
    if (shift) y = y + at.get(shift + c);
    at.put(u + c, y);
  });
  statistics[0] = r;
  if (CENTRED) statistics[1] = mean;
}

// du from dy, u and the statistics; adds to the gradients of weight and shift.
static void normalise_backward(const stream_t* dy, const stream_t* u, const float* weight,
                               const float* statistics, float* du, float* dweight, float* dshift,
                               long channels) {
  const float r = statistics[0], mean = CENTRED ? statistics[1] : 0.0f;
  vec with_y = {}, total = {};
  for_channels(channels, false, [&](long c, auto at) ALWAYS_INLINE {
    const vec d = at.get(dy + c), y = (at.get(u + c) - mean) * r;
    const vec g = weight ? d * at.get(weight + c) : d;
    with_y += g * y;
    if (CENTRED) total += g;
    at.put(dweight + c, at.get(dweight + c) + d * (ROUNDS ? rounded<stream_t>(y) : y));
    at.put(dshift + c, at.get(dshift + c) + d);
  });
  const float along = sum(with_y) / float(channels);
  const float level = CENTRED ? sum(total) / float(channels) : 0.0f;
  for_channels(channels, false, [&](long c, auto at) ALWAYS_INLINE {
    const vec d = at.get(dy + c), y = (at.get(u + c) - mean) * r;
    const vec g = weight ? d * at.get(weight + c) : d;
    at.put(du + c, (g - level - y * along) * r);
  });
}

struct Norm {
  static constexpr bool APPLIES = true;
  static constexpr int STATISTICS = CENTRED ? 2 : 1;  // numbers of a token
  const float *weight, *shift;
  float* statistics;

  MEMBER void put(stream_t* u, long token, long channels) const {
    normalise(u, weight, shift, statistics + token * STATISTICS, channels);
  }
};

struct NormBackward {
  static constexpr bool APPLIES = true;
  const float *weight, *statistics;
  float *dweight, *dshift;
  float* own;  // for every thread a row of each gradient, and one for u

  MEMBER void begin(const Sizes& size, float* du) const {
    std::memset(own + 3 * thread() * size.padded, 0, 2 * size.padded * sizeof(float));
    std::memset(du, 0, L * size.padded * sizeof(float));  // also behind the channels of a row
  }

  // du of one token, whose state between the sites is row i of a block.
  MEMBER void put_backward(const stream_t* dy, Rows y, const Sizes& size, int i, long token,
                           const vec* pre, float* du) const {
    float* const sums = own + 3 * thread() * size.padded;
    stream_t* const u = (stream_t*)(sums + 2 * size.padded);
    read_token(size, y, i, pre, u);
    normalise_backward(dy, u, weight, statistics + token * Norm::STATISTICS, du, sums,
                       sums + size.padded, size.channels);
  }

  // The sums of all threads, in their order.
  MEMBER void end(const Sizes& size) const {
#pragma omp barrier
#pragma omp for
    for (long c = 0; c < size.padded; c += L) {
      vec of_weight = {}, of_shift = {};
      for (int b = 0; b < team(); ++b) {
        of_weight += load(own + 3 * b * size.padded + c);
        of_shift += load(own + (3 * b + 1) * size.padded + c);
      }
      const int count = int(size.channels - c < L ? size.channels - c : L);
      store(dweight + c, of_weight, count);
      store(dshift + c, of_shift, count);
    }
  }
};

extern "C" long mhc_seam_norm_workspace(long channels, int threads) {
  const Sizes size(channels);
  return size.phi + threads * size.block;
}

extern "C" void mhc_seam_norm(const stream_t* X, const stream_t* F, const float* h_post,
                              const float* h_res, const float* phi, const float* bias,
                              const float* alpha, const float* weight, const float* shift,
                              stream_t* Y, stream_t* U, float* next_post, float* next_res,
                              float* saved, float* statistics, float* workspace, long tokens,
                              long channels, int threads, int by_output) {
  seam(X, F, h_post, h_res, phi, bias, alpha, Y, U, next_post, next_res, saved,
       Norm{weight, shift, statistics}, workspace, tokens, channels, threads, by_output);
}

extern "C" long mhc_seam_norm_backward_workspace(long channels, int threads) {
  const Sizes size(channels);
  return size.phi + threads * (size.phi + size.sums + 2 * size.block + (L + 3) * size.padded);
}

extern "C" void mhc_seam_norm_backward(
    const stream_t* dY, const stream_t* dU, const float* dnext_post, const float* dnext_res,
    const stream_t* X, const stream_t* F, const float* h_post, const float* h_res, const float* phi,
    const float* bias, const float* alpha, const float* weight, const float* saved,
    const float* statistics, stream_t* dX, stream_t* dF, float* dh_post, float* dh_res, float* dphi,
    float* dbias, float* dalpha, float* dweight, float* dshift, float* workspace, long tokens,
    long channels, int threads, int by_output) {
  const Sizes size(channels);
  float* const own = workspace;
  seam_backward(dY, dU, dnext_post, dnext_res, X, F, h_post, h_res, phi, bias, alpha, saved, dX, dF,
                dh_post, dh_res, dphi, dbias, dalpha, nullptr,
                NormBackward{weight, statistics, dweight, dshift, own},
                workspace + threads * 3 * size.padded, tokens, channels, threads, by_output);
}
