// Plain C++ already: the launchers of golden_rms_norm, with a residual.
#include "ops/phi_residual_rmsnorm.cu"
