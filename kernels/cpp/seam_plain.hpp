// mhc::seam and mhc::seam_backward as the libraries offer them.
extern "C" long mhc_seam_workspace(long channels, int threads) {
  const Sizes size(channels);
  return size.phi + threads * size.block;
}

extern "C" void mhc_seam(const stream_t* X, const stream_t* F, const float* h_post,
                         const float* h_res, const float* phi, const float* bias,
                         const float* alpha, stream_t* Y, stream_t* U, float* next_post,
                         float* next_res, float* saved, float* workspace, long tokens,
                         long channels, int threads, int by_output) {
  seam(X, F, h_post, h_res, phi, bias, alpha, Y, U, next_post, next_res, saved, NoNorm(), workspace,
       tokens, channels, threads, by_output);
}

extern "C" long mhc_seam_backward_workspace(long channels, int threads) {
  const Sizes size(channels);
  return size.phi + threads * (size.phi + size.sums + 2 * size.block + L * size.padded);
}

extern "C" void mhc_seam_backward(const stream_t* dY, const stream_t* dU, const float* dnext_post,
                                  const float* dnext_res, const stream_t* X, const stream_t* F,
                                  const float* h_post, const float* h_res, const float* phi,
                                  const float* bias, const float* alpha, const float* saved,
                                  stream_t* dX, stream_t* dF, float* dh_post, float* dh_res,
                                  float* dphi, float* dbias, float* dalpha, float* dz,
                                  float* workspace, long tokens, long channels, int threads,
                                  int by_output) {
  seam_backward(dY, dU, dnext_post, dnext_res, X, F, h_post, h_res, phi, bias, alpha, saved, dX, dF,
                dh_post, dh_res, dphi, dbias, dalpha, dz, NoNorm(), workspace, tokens, channels,
                threads, by_output);
}
