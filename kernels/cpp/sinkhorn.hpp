// mhc::sinkhorn and its gradient alone: matrices [tokens][n * n], L of them at once.

extern "C" void mhc_sinkhorn(const float* logits, float* out, long tokens, long, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const Range range = share(tokens);
    for (long t = range.first; t < range.last; t += L) {
      const int count = int(range.last - t < L ? range.last - t : L);
      vec h[N * N], m[N * N];
      get_lanes<N * N>(logits + t * N * N, count, h);
      matrix(h, m);
      put_lanes<N * N>(out + t * N * N, count, m);
    }
  }
}

extern "C" void mhc_sinkhorn_backward(const float* grad, const float* logits, float* out,
                                      long tokens, long, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const Range range = share(tokens);
    for (long t = range.first; t < range.last; t += L) {
      const int count = int(range.last - t < L ? range.last - t : L);
      vec g[N * N], h[N * N], dh[N * N];
      get_lanes<N * N>(grad + t * N * N, count, g);
      get_lanes<N * N>(logits + t * N * N, count, h);
      matrix_backward(g, h, dh);
      put_lanes<N * N>(out + t * N * N, count, dh);
    }
  }
}
