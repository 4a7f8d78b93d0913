// Everything libkdq offers.
#pragma once

#include "kdq/attention.h"
#include "kdq/binary_gemm.h"
#include "kdq/bitplanes.h"
#include "kdq/codebook.h"
#include "kdq/conv2d.h"
#include "kdq/distillation.h"
#include "kdq/fake_quant.h"
#include "kdq/int8_gemm.h"
#include "kdq/isa.h"
#include "kdq/parallel.h"
#include "kdq/peaks.h"
#include "kdq/status.h"
#include "kdq/types.h"
