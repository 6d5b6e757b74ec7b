// mhc::pre and its gradient. Blocks of L tokens stay in the caches from the projection to the
// pre-mix; coefficients are vectors over those tokens.

constexpr int O = M / S;  // outputs of one projected row: a token, or one stream of it

struct Sizes {
  long channels, padded, width, phi, block;
  MEMBER explicit Sizes(long c)
      : channels(c), padded(padded_to_vectors(c)), width(N / S * padded), phi(width * O),
        block(L * N * padded) {}
};

// The affine map of equation (16) with its scales: pre, post, res.
INLINE float scale(const float* alpha, int m) { return alpha[m < N ? 0 : m < 2 * N ? 1 : 2]; }

extern "C" long mhc_pre_workspace(long channels, int threads) {
  const Sizes size(channels);
  return size.phi + threads * size.block;
}

extern "C" void mhc_pre(const stream_t* X, const float* phi, const float* bias, const float* alpha,
                        stream_t* U, float* h_post, float* h_res, float* saved, float* workspace,
                        long tokens, long channels, int threads) {
  const Sizes size(channels);
#pragma omp parallel num_threads(threads)
  {
    pack<O>(phi, workspace, N / S, channels, size.padded);
    float* copy = workspace + size.phi + thread() * size.block;
    const Range range = share(tokens);
    for (long t = range.first; t < range.last; t += L) {
      const int count = int(range.last - t < L ? range.last - t : L);
      const float* x =
          staged(X + t * N * channels, copy, N, channels, size.padded, count);
      const long after = range.last < t + 2 * L ? range.last : t + 2 * L;
      Ahead ahead{(const char*)(X + (t + L) * N * channels),
                  (const char*)(X + after * N * channels)};

      vec z[M], inverse[S], h[M], pre[N], post[N], res[N * N];
      for (int s = 0; s < S; ++s) {
        vec square;
        project<O>(x + s * size.width, N * size.padded, size.width, count, workspace, ahead, z + s,
                   S, &square);
        inverse[s] = 1.0f / sqrt(square / float(N / S * channels) + NORM_EPS);
      }
      for (int m = 0; m < M; ++m)
        h[m] = scale(alpha, m) * bounded(z[m] * inverse[m % S]) + bias[m];  // (16)
      for (int i = 0; i < N; ++i) {
        pre[i] = pre_gate(h[i]);        // (17)
        post[i] = post_gate(h[N + i]);  // (18)
      }
      put_lanes<N>(h_post + t * N, count, post);
      if (MIXES) {
        matrix(h + 2 * N, res);  // (19)
        put_lanes<N * N>(h_res + t * N * N, count, res);
      }
      put_lanes<M>(saved + t * (M + S), count, z, M + S);
      put_lanes<S>(saved + t * (M + S) + M, count, inverse, M + S);
      for (int i = 0; i < count; ++i) {
        float weights[N];
        for (int j = 0; j < N; ++j) weights[j] = pre[j][i];
        read_streams(x + i * N * size.padded, size.padded, weights, U + (t + i) * channels,
                     channels);
      }
    }
  }
}

extern "C" long mhc_pre_backward_workspace(long channels, int threads) {
  const Sizes size(channels);
  return size.phi + threads * (size.phi + (M + 3) * L + 2 * size.block + L * size.padded);
}

extern "C" void mhc_pre_backward(const stream_t* dU, const float* dh_post, const float* dh_res,
                                 const stream_t* X, const float* phi, const float* bias,
                                 const float* alpha, const float* saved, stream_t* dX, float* dphi,
                                 float* dbias, float* dalpha, float* workspace, long tokens,
                                 long channels, int threads) {
  const Sizes size(channels);
  const long stride = N * size.padded;
  float* const packed = workspace;
  float* const phi_sums = packed + size.phi;
  float* const vector_sums = phi_sums + threads * size.phi;
  float* const copies = vector_sums + threads * (M + 3) * L;
#pragma omp parallel num_threads(threads)
  {
    pack<O>(phi, packed, N / S, channels, size.padded);
    float* const phi_sum = phi_sums + thread() * size.phi;
    std::memset(phi_sum, 0, size.phi * sizeof(float));
    float* const x_copy = copies + thread() * (2 * size.block + L * size.padded);
    float *const dx_copy = x_copy + size.block, *const du_copy = dx_copy + size.block;
    vec bias_sum[M] = {}, alpha_sum[3] = {};
    const Range range = share(tokens);
    const bool streamed = far(dX, tokens, N * channels);
    for (long t = range.first; t < range.last; t += L) {
      const int count = int(range.last - t < L ? range.last - t : L);
      const long after = range.last < t + 2 * L ? range.last : t + 2 * L;
      const float* x = staged(X + t * N * channels, x_copy, N, channels, size.padded, count);
      const float* du = staged(dU + t * channels, du_copy, 1, channels, size.padded, count);
      Ahead next_x{(const char*)(X + (t + L) * N * channels),
                   (const char*)(X + after * N * channels)};
      Ahead next_du{(const char*)(dU + (t + L) * channels), (const char*)(dU + after * channels)};

      vec z[M], inverse[S], hidden[M], h[M], pre[N], dh[M], g_post[N], g_res[N * N];
      get_lanes<M>(saved + t * (M + S), count, z, M + S);
      get_lanes<S>(saved + t * (M + S) + M, count, inverse, M + S);
      for (int m = 0; m < M; ++m) {
        hidden[m] = bounded(z[m] * inverse[m % S]);
        h[m] = scale(alpha, m) * hidden[m] + bias[m];
      }
      get_lanes<N>(dh_post + t * N, count, g_post);
      vec dots[N][L] = {};
      for (int i = 0; i < count; ++i) {
        vec sums[N] = {};
        for (long c = 0; c < size.padded; c += L) {
          const vec g = load(du + i * size.padded + c);
          UNROLL for (int j = 0; j < N; ++j)
            sums[j] += g * load(x + i * stride + j * size.padded + c);
        }
        for (int j = 0; j < N; ++j) dots[j][i] = sums[j];
      }
      for (int i = 0; i < N; ++i) {
        pre[i] = pre_gate(h[i]);
        dh[i] = pre_gate_backward(lane_sums(dots[i]), h[i]);
        dh[N + i] = post_gate_backward(g_post[i], h[N + i]);
      }
      if (MIXES) {
        get_lanes<N * N>(dh_res + t * N * N, count, g_res);
        matrix_backward(g_res, h + 2 * N, dh + 2 * N);
      }

      // Through (16) and the division by the norm: d(1/r)/dx = -(1/r)^3 x / (values of one norm).
      vec dz[M], shrink[S] = {};
      for (int m = 0; m < M; ++m) {
        bias_sum[m] += dh[m];
        alpha_sum[m < N ? 0 : m < 2 * N ? 1 : 2] += dh[m] * hidden[m];
        const vec g = bounded_backward(dh[m] * scale(alpha, m), hidden[m]);
        dz[m] = g * inverse[m % S];
        shrink[m % S] -= g * z[m];
      }
      float rows[S][L * O];
      for (int s = 0; s < S; ++s) {
        shrink[s] *= inverse[s] * inverse[s] * inverse[s] / float(N / S * channels);
        for (int i = 0; i < L; ++i)
          for (int o = 0; o < O; ++o) rows[s][i * O + o] = dz[o * S + s][i];
      }

      const bool direct = in_place<stream_t>(channels, count);
      float* const dx = direct ? (float*)(dX + t * N * channels) : dx_copy;
      for (int j = 0; j < N; ++j) {
        const int s = S == 1 ? 0 : j;
        const long from = S == 1 ? j * size.padded : 0;  // where stream j begins in phi
        auto step = [&](long c, auto columns) {
          constexpr int V = decltype(columns)::value;
          const long at = j * size.padded + c;
          next_x.fetch(V * L * L / 16);
          next_du.fetch(V * L * L / 16 / N);
          add_phi_gradient<V, O>(x + at, stride, count, rows[s], phi_sum + (from + c) * O);
          state_gradient<V, O>(x + at, du + c, size.padded, stride, count, packed + (from + c) * O,
                               rows[s], shrink[s], pre[j], dx + at, direct && streamed);
        };
        long c = 0;
        for (; c + COLS * L <= size.padded; c += COLS * L) step(c, Columns<COLS>());
        for (; c < size.padded; c += L) step(c, Columns<1>());
      }
      if (!direct)
        for (long row = 0; row < (long)count * N; ++row)
          for_channels(channels, false, [&](long c, auto at) {
            at.put(dX + (t * N + row) * channels + c, load(dx_copy + row * size.padded + c));
          });
    }
    finish_streams();
    float* const own = vector_sums + thread() * (M + 3) * L;
    for (int m = 0; m < M; ++m) store(own + m * L, bias_sum[m]);
    for (int i = 0; i < 3; ++i) store(own + (M + i) * L, alpha_sum[i]);
#pragma omp barrier
    unpack_sum<O>(phi_sums, size.phi, team(), dphi, N / S, channels, size.padded);
#pragma omp single
    for (int m = 0; m < M + 3; ++m) {
      vec total = {};
      for (int b = 0; b < team(); ++b) total += load(vector_sums + (b * (M + 3) + m) * L);
      (m < M ? dbias + m : dalpha + m - M)[0] = sum(total);
    }
  }
}
