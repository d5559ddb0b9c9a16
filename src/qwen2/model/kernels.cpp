// What PyTorch's own operators cannot do fast enough on a CPU; a C interface, bound in native.py:
//
//   step        one pass of a whole dense decoder over a few tokens. It is bound by reading the
//               weights, so they are read once, in order, by threads that never leave the pass
//   attention   causal attention over paged keys and values, block by block, without a score matrix
//   quantise, scale_products, swiglu    what stands around PyTorch's integer products in a prefill
//
// Letters as everywhere: N tokens, H query heads, K kv heads, D head_dim, C width, I intermediate.
// Every fast loop has a plain one beside it, which other processors use and tests compare with.
// Results for a token do not depend on what else is in the batch: sums have one order.

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && \
    defined(__AVX512VL__) && !defined(QWEN2_PLAIN)
#define FAST 1
#include <immintrin.h>
#else
#define FAST 0
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#define PAUSE() _mm_pause()
#else
#define PAUSE() std::this_thread::yield()
#endif

// A loop that is unrolled, so that arrays of registers are registers.
#define EACH(i, count) _Pragma("GCC unroll 16") for (int i = 0; i < (count); i++)

namespace {

using bf16 = uint16_t;  // the upper half of a float
using fp16 = uint16_t;

constexpr int TILE = 4;    // rows of a weight, and tokens, that are multiplied together
constexpr int MOST_D = 256;
constexpr int KEYS = 64;   // keys whose scores exist at the same time
constexpr int AHEAD = 4096;  // bytes of a weight that are fetched before they are needed
constexpr size_t SMALL = 1 << 20;  // products that are not worth a second thread
constexpr int GROUP = 32;  // values of an int4 weight that share scale and minimum
constexpr int CHUNK = 64;  // values of an int4 weight whose nibbles lie in 32 bytes

float widen(bf16 x) {
  uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

bf16 narrow(float x) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float half(fp16 x) {
  _Float16 y;
  std::memcpy(&y, &x, 2);
  return float(y);
}

// ---------------------------------------------------------------------------------- threads

// Threads that run one function together and meet at barriers. They spin while they work, for a
// barrier comes every few dozen microseconds, and sleep between calls.
class Pool {
 public:
  explicit Pool(int threads) : threads_(threads) {
    for (int i = 1; i < threads; i++) workers_.emplace_back([this, i] { serve(i); });
  }
  ~Pool() {
    work_ = nullptr;
    wake();
    for (auto& worker : workers_) worker.join();
  }
  int threads() const { return threads_; }

  void run(const std::function<void(int)>& work) {
    work_ = &work;
    wake();
    work(0);
    barrier();
  }

  void barrier() {
    uint32_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      phase_.notify_all();
      return;
    }
    for (int spins = 0; spins < 4000 && phase_.load(std::memory_order_acquire) == phase; spins++)
      PAUSE();
    // Somebody else has the processor of a thread of ours: who sleeps is let in at once when woken.
    while (phase_.load(std::memory_order_acquire) == phase)
      phase_.wait(phase, std::memory_order_acquire);
  }

 private:
  void wake() {
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
  }
  void serve(int index) {
    for (uint32_t seen = 0;;) {
      for (int spins = 0; spins < 500 && epoch_.load(std::memory_order_acquire) == seen; spins++)
        PAUSE();
      epoch_.wait(seen, std::memory_order_acquire);
      seen = epoch_.load(std::memory_order_acquire);
      if (!work_) return;
      (*work_)(index);
      barrier();
    }
  }

  int threads_;
  std::vector<std::thread> workers_;
  std::atomic<uint32_t> epoch_{0}, phase_{0};
  std::atomic<int> arrived_{0};
  const std::function<void(int)>* work_ = nullptr;
};

struct Share {  // of the rows of a weight
  int begin, end;
};

// Rows, a multiple of TILE, handed out to T threads in shares that become smaller: the memory does
// not serve all threads alike, and whoever was served best takes more.
class Rows {
 public:
  bool take(int count, int T, Share& share) {
    int begin = next_.load(std::memory_order_relaxed);
    do {
      if (begin >= count) return false;
      int size = std::max(LEAST, (count - begin) / (2 * T) / LEAST * LEAST);
      share = {begin, std::min(count, begin + size)};
    } while (!next_.compare_exchange_weak(begin, share.end, std::memory_order_relaxed));
    return true;
  }

 private:
  static constexpr int LEAST = 4 * TILE;  // what elementwise loops take at a time, too
  std::atomic<int> next_{0};
};

}  // namespace

// --------------------------------------------------------------- what native.py hands over

extern "C" {

enum Format : int32_t { BF16 = 0, INT8 = 1, INT4 = 2 };

struct Matrix {  // (n, k), row after row; n a multiple of TILE, k of CHUNK
  Format format;
  int32_t n, k;
  const void* weight;           // INT4: nibbles, see CHUNK
  const float* scale;           // INT8: (n,)
  const int32_t* sums;          // INT8: 128 times the sum of each row, (n,)
  const fp16* group_scale;      // INT4: (n, k / GROUP)
  const fp16* group_minimum;    // INT4: (n, k / GROUP)
  const float* bias;            // (n,) or null
};

struct Store {  // of one layer: bf16, or int8 where there are scales
  void *keys, *values;            // (slots, K, D)
  float *key_scale, *value_scale; // (slots, K)
  const float* bias;              // (K, D), which int8 keys lack
  const float *cos, *sin;         // (positions, D/2), to rotate it
};

struct Layer {
  const float *input_norm, *post_norm;  // (C,)
  Matrix qkv, o, gate_up, down;
  Store store;
};

struct Model {
  int32_t layers, C, H, K, D, I, V, block_size;
  float eps;
  const float *cos, *sin;  // (positions, D/2)
  const Layer* layer;
  const float* norm;
  Matrix embedding, head;
};

struct Batch {
  int32_t n, sequences, rows, table_width;
  const int32_t *tokens, *positions;  // (n,)
  const int32_t *starts;              // (sequences + 1,) first flat token of each
  const int32_t *tables;              // (sequences, table_width) blocks of each
  const int32_t *wanted;              // (rows,) flat tokens whose logits are asked for
  float* logits;                      // (rows, V)
};

}  // extern "C"

namespace {

// --------------------------------------------------------------------------------- products

// m rows of inputs in the form that a format's products want.
struct Inputs {
  int m = 0, k = 0;
  std::vector<bf16> wide;       // BF16
  std::vector<uint8_t> bytes;   // INT8: value + 128, for the instruction's first factor is unsigned
  std::vector<int8_t> values;   // INT4
  std::vector<float> scale;     // INT8, INT4: (m,)
  std::vector<float> sums;      // INT4: sum of each group of inputs, (m, k / GROUP)
};

float largest(const float* x, int k) {
  float most = 0;
#if FAST
  __m512 all = _mm512_setzero_ps();
  for (int i = 0; i < k; i += 16) {
    __mmask16 in = k - i >= 16 ? 0xffff : (1u << (k - i)) - 1;
    all = _mm512_max_ps(all, _mm512_abs_ps(_mm512_maskz_loadu_ps(in, x + i)));
  }
  most = _mm512_reduce_max_ps(all);
#else
  for (int i = 0; i < k; i++) most = std::max(most, std::fabs(x[i]));
#endif
  return most;
}

// Symmetric int8 by the row's largest value; returns the scale.
float quantise_row(const float* x, int k, int8_t* out) {
  float most = std::max(largest(x, k), 1e-30f);
  float inverse = 1 / most * 127;  // as PyTorch divides a number by a tensor
#if FAST
  __m512 by = _mm512_set1_ps(inverse);
  for (int i = 0; i < k; i += 16) {
    __mmask16 in = k - i >= 16 ? 0xffff : (1u << (k - i)) - 1;
    __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(in, x + i), by));
    _mm_mask_storeu_epi8(out + i, in, _mm512_cvtsepi32_epi8(q));
  }
#else
  for (int i = 0; i < k; i++) out[i] = int8_t(std::nearbyint(x[i] * inverse));
#endif
  return most / 127;
}

void narrow_row(const float* x, int k, bf16* out) {
  int i = 0;
#if FAST
  for (; i + 16 <= k; i += 16)
    _mm256_storeu_si256((__m256i*)(out + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i)));
#endif
  for (; i < k; i++) out[i] = narrow(x[i]);
}

void widen_row(const bf16* x, int k, float* out) {
  for (int i = 0; i < k; i++) out[i] = widen(x[i]);
}

void prepare_row(Format format, const float* x, int row, Inputs& in) {
  int k = in.k;
  if (format == BF16) return narrow_row(x, k, &in.wide[size_t(row) * k]);
  int8_t* q = &in.values[size_t(row) * k];
  in.scale[row] = quantise_row(x, k, q);
  if (format == INT8) {
    uint8_t* out = &in.bytes[size_t(row) * k];
    for (int i = 0; i < k; i++) out[i] = uint8_t(q[i] + 128);
    return;
  }
  for (int g = 0; g < k / GROUP; g++) {
    int sum = 0;
    for (int i = 0; i < GROUP; i++) sum += q[g * GROUP + i];
    in.sums[size_t(row) * (k / GROUP) + g] = float(sum);
  }
}

void resize(Format format, int m, int k, Inputs& in) {
  in.m = m, in.k = k;
  size_t size = size_t(m) * k;
  if (format == BF16 && in.wide.size() < size) in.wide.resize(size);
  if (format != BF16 && in.values.size() < size) in.values.resize(size), in.bytes.resize(size);
  if (int(in.scale.size()) < m) in.scale.resize(m);
  if (format == INT4 && in.sums.size() < size / GROUP) in.sums.resize(size / GROUP);
}

// x (m, k) floats.
void prepare(Format format, const float* x, int m, int k, Inputs& in) {
  resize(format, m, k, in);
  for (int row = 0; row < m; row++) prepare_row(format, x + size_t(row) * k, row, in);
}

#if FAST
// sum + for each of 16 lanes the product of four unsigned and four signed bytes. In assembler,
// for GCC 12 copies the sum before and after the intrinsic: it runs at a third of the speed.
inline __m512i dot_bytes(__m512i sum, __m512i unsigned_bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
  return sum;
}

// Ask for what will be read next; more ahead when there is more to compute in between.
template <Format F, int M>
inline void fetch(const void* now) {
  if (F == INT4 || M > 1)
    _mm_prefetch((const char*)now + (M == 1 ? AHEAD : 2 * AHEAD), _MM_HINT_T0);
}

inline __m128 sums_of_four(__m512 a, __m512 b, __m512 c, __m512 d) {
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

inline __m128i sums_of_four(__m512i a, __m512i b, __m512i c, __m512i d) {
  __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  __m512i all =
      _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti32x8_epi32(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}
#endif

// Products of TILE rows from `row` on (all of them exist) with M tokens from `token` on.
template <int M>
void bf16_tile(const Matrix& w, const Inputs& in, int row, int token, float (*y)[TILE]) {
  int k = w.k;
  const bf16* rows = (const bf16*)w.weight + size_t(row) * k;
  const bf16* x = in.wide.data() + size_t(token) * k;
#if FAST
  __m512 sum[M][TILE];
  EACH(m, M) EACH(r, TILE) sum[m][r] = _mm512_setzero_ps();
  for (int i = 0; i < k; i += 32) {
    __m512bh weights[TILE];
    EACH(r, TILE) {
      fetch<BF16, M>(rows + size_t(r) * k + i);
      weights[r] = (__m512bh)_mm512_loadu_si512(rows + size_t(r) * k + i);
    }
    EACH(m, M) {
      __m512bh inputs = (__m512bh)_mm512_loadu_si512(x + size_t(m) * k + i);
      EACH(r, TILE) sum[m][r] = _mm512_dpbf16_ps(sum[m][r], weights[r], inputs);
    }
  }
  EACH(m, M)
    _mm_storeu_ps(y[m], sums_of_four(sum[m][0], sum[m][1], sum[m][2], sum[m][3]));
#else
  for (int m = 0; m < M; m++)
    for (int r = 0; r < TILE; r++) {
      float sum = 0;
      for (int i = 0; i < k; i++)
        sum += widen(rows[size_t(r) * k + i]) * widen(x[size_t(m) * k + i]);
      y[m][r] = sum;
    }
#endif
}

template <int M>
void int8_tile(const Matrix& w, const Inputs& in, int row, int token, float (*y)[TILE]) {
  int k = w.k;
  const int8_t* rows = (const int8_t*)w.weight + size_t(row) * k;
  const uint8_t* x = in.bytes.data() + size_t(token) * k;
#if FAST
  __m512i sum[M][TILE];
  EACH(m, M) EACH(r, TILE) sum[m][r] = _mm512_setzero_si512();
  for (int i = 0; i < k; i += 64) {
    __m512i weights[TILE];
    EACH(r, TILE) {
      fetch<INT8, M>(rows + size_t(r) * k + i);
      weights[r] = _mm512_loadu_si512(rows + size_t(r) * k + i);
    }
    EACH(m, M) {
      __m512i inputs = _mm512_loadu_si512(x + size_t(m) * k + i);
      EACH(r, TILE) sum[m][r] = dot_bytes(sum[m][r], inputs, weights[r]);
    }
  }
  __m128i shift = _mm_loadu_si128((const __m128i*)(w.sums + row));
  __m128 scale = _mm_loadu_ps(w.scale + row);
  EACH(m, M) {
    __m128i dots = sums_of_four(sum[m][0], sum[m][1], sum[m][2], sum[m][3]);
    __m128 whole = _mm_cvtepi32_ps(_mm_sub_epi32(dots, shift));
    _mm_storeu_ps(y[m], _mm_mul_ps(_mm_mul_ps(whole, _mm_set1_ps(in.scale[token + m])), scale));
  }
#else
  for (int m = 0; m < M; m++)
    for (int r = 0; r < TILE; r++) {
      int32_t sum = 0;
      for (int i = 0; i < k; i++) sum += int32_t(x[size_t(m) * k + i]) * rows[size_t(r) * k + i];
      y[m][r] = float(sum - w.sums[row + r]) * in.scale[token + m] * w.scale[row + r];
    }
#endif
}

template <int M>
void int4_tile(const Matrix& w, const Inputs& in, int row, int token, float (*y)[TILE]) {
  int k = w.k, groups = k / GROUP;
  const uint8_t* rows = (const uint8_t*)w.weight + size_t(row) * (k / 2);
  const int8_t* x = in.values.data() + size_t(token) * k;
  const float* xsums = in.sums.data() + size_t(token) * groups;
  const fp16* scales = w.group_scale + size_t(row) * groups;
  const fp16* minima = w.group_minimum + size_t(row) * groups;
#if FAST
  const __m512i low = _mm512_set1_epi8(15);
  const __m512i spread = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
  __m512 sum[M][TILE];
  EACH(m, M) EACH(r, TILE) sum[m][r] = _mm512_setzero_ps();
  for (int i = 0; i < k; i += CHUNK) {
    EACH(r, TILE) {
      const uint8_t* at = rows + size_t(r) * (k / 2) + i / 2;
      fetch<INT4, M>(at);
      __m256i packed = _mm256_loadu_si256((const __m256i*)at);
      __m512i weights = _mm512_and_si512(
          low, _mm512_inserti64x4(_mm512_castsi256_si512(packed), _mm256_srli_epi16(packed, 4), 1));
      int32_t pair;
      std::memcpy(&pair, scales + size_t(r) * groups + i / GROUP, 4);
      __m512 scale = _mm512_permutexvar_ps(
          spread, _mm512_castps128_ps512(_mm_cvtph_ps(_mm_cvtsi32_si128(pair))));
      EACH(m, M) {
        __m512i dot = dot_bytes(_mm512_setzero_si512(), weights,
                                _mm512_loadu_si512(x + size_t(m) * k + i));
        sum[m][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, sum[m][r]);
      }
    }
  }
  for (int g = 0; g < groups; g += 16) {
    __mmask16 rest = groups - g >= 16 ? 0xffff : (1u << (groups - g)) - 1;
    EACH(r, TILE) {
      __m512 minimum =
          _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(rest, minima + size_t(r) * groups + g));
      EACH(m, M)
        sum[m][r] = _mm512_fmadd_ps(
            minimum, _mm512_maskz_loadu_ps(rest, xsums + size_t(m) * groups + g), sum[m][r]);
    }
  }
  EACH(m, M)
    _mm_storeu_ps(y[m], sums_of_four(sum[m][0], sum[m][1], sum[m][2], sum[m][3]));
#else
  for (int m = 0; m < M; m++)
    for (int r = 0; r < TILE; r++) {
      float sum = 0;
      for (int g = 0; g < groups; g++) {
        const uint8_t* at = rows + size_t(r) * (k / 2) + g * GROUP / CHUNK * (CHUNK / 2);
        int32_t dot = 0, shift = g * GROUP % CHUNK ? 4 : 0;
        for (int i = 0; i < GROUP; i++)
          dot += ((at[i] >> shift) & 15) * int32_t(x[size_t(m) * k + g * GROUP + i]);
        sum += half(scales[size_t(r) * groups + g]) * float(dot) +
               half(minima[size_t(r) * groups + g]) * xsums[size_t(m) * groups + g];
      }
      y[m][r] = sum;
    }
#endif
  for (int m = 0; m < M; m++)
    for (int r = 0; r < TILE; r++) y[m][r] *= in.scale[token + m];
}

template <Format F, int M>
inline void tile(const Matrix& w, const Inputs& in, int row, int token, float (*y)[TILE]) {
  if constexpr (F == BF16) bf16_tile<M>(w, in, row, token, y);
  if constexpr (F == INT8) int8_tile<M>(w, in, row, token, y);
  if constexpr (F == INT4) int4_tile<M>(w, in, row, token, y);
}

// Apart from its loop, where its many sums would not stay in registers.
template <Format F, int M>
[[gnu::noinline]] void large_tile(const Matrix& w, const Inputs& in, int row, int token,
                                  float (*y)[TILE]) {
  tile<F, M>(w, in, row, token, y);
}

// Rows [begin, end) for M tokens from `token` on, bias included, into or, with `add`, onto
// out (m, stride).
template <Format F, int M>
void block(const Matrix& w, const Inputs& in, int begin, int end, int token,
                             float* out, int stride, bool add) {
  float y[M][TILE];
  for (int row = begin; row < end; row += TILE) {
    if constexpr (M == 1) tile<F, M>(w, in, row, token, y);
    else large_tile<F, M>(w, in, row, token, y);
    for (int m = 0; m < M; m++) {
      float* to = out + size_t(token + m) * stride + row;
      for (int r = 0; r < TILE; r++)
        to[r] = y[m][r] + (w.bias ? w.bias[row + r] : 0) + (add ? to[r] : 0);
    }
  }
}

// The second half of the rows of a matrix without bias.
Matrix lower_half(Matrix w) {
  int n = w.n /= 2, groups = w.k / GROUP;
  size_t bytes = w.format == BF16 ? 2 * size_t(w.k) : w.format == INT8 ? w.k : w.k / 2;
  w.weight = (const char*)w.weight + bytes * n;
  if (w.format == INT8) w.scale += n, w.sums += n;
  if (w.format == INT4) w.group_scale += size_t(n) * groups, w.group_minimum += size_t(n) * groups;
  return w;
}

template <Format F>
void linear_in(const Matrix& w, const Inputs& in, Share share, float* out, int stride, bool add) {
  if (in.m == 1) return block<F, 1>(w, in, share.begin, share.end, 0, out, stride, add);
  for (int row = share.begin; row < share.end; row += TILE)
    for (int token = 0; token < in.m; token += TILE) {
      int end = row + TILE;
      switch (in.m - token) {
        case 1: block<F, 1>(w, in, row, end, token, out, stride, add); break;
        case 2: block<F, 2>(w, in, row, end, token, out, stride, add); break;
        case 3: block<F, 3>(w, in, row, end, token, out, stride, add); break;
        default: block<F, 4>(w, in, row, end, token, out, stride, add);
      }
    }
}

// Rows of `share` of every token's product into, or with `add` onto, out (m, stride).
void linear(const Matrix& w, const Inputs& in, Share share, float* out, int stride, bool add) {
  if (w.format == BF16) linear_in<BF16>(w, in, share, out, stride, add);
  if (w.format == INT8) linear_in<INT8>(w, in, share, out, stride, add);
  if (w.format == INT4) linear_in<INT4>(w, in, share, out, stride, add);
}

// ------------------------------------------------------------------------------ elementwise

#if FAST
__m512 exponential(__m512 x) {  // to about 2e-7 of the value; 0 for very negative x
  x = _mm512_max_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _mm512_set1_ps(-200));
  __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT);
  __m512 f = _mm512_mul_ps(_mm512_sub_ps(x, whole), _mm512_set1_ps(0.693147181f));
  __m512 p = _mm512_set1_ps(1.f / 720);
  for (float c : {1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f})
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, whole);
}
#endif

void rms_norm(const float* x, const float* weight, int C, float eps, float* out) {
  float square = 0;
#if FAST
  __m512 all = _mm512_setzero_ps();
  int i = 0;
  for (; i + 16 <= C; i += 16) {
    __m512 v = _mm512_loadu_ps(x + i);
    all = _mm512_fmadd_ps(v, v, all);
  }
  square = _mm512_reduce_add_ps(all);
  for (; i < C; i++) square += x[i] * x[i];
#else
  for (int i = 0; i < C; i++) square += x[i] * x[i];
#endif
  float by = 1 / std::sqrt(square / C + eps);
  for (int j = 0; j < C; j++) out[j] = x[j] * by * weight[j];
}

// gate = silu(gate) * up
void swiglu_row(float* gate, const float* up, int count) {
  int i = 0;
#if FAST
  for (; i + 16 <= count; i += 16) {
    __m512 g = _mm512_loadu_ps(gate + i);
    __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), g));
    __m512 y = _mm512_div_ps(g, _mm512_add_ps(_mm512_set1_ps(1), e));
    _mm512_storeu_ps(gate + i, _mm512_mul_ps(y, _mm512_loadu_ps(up + i)));
  }
#endif
  for (; i < count; i++) gate[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
}

// Unit i of the first half of a head turns with unit i of the second.
void rotate(const float* x, const float* cos, const float* sin, int D, float* out) {
  for (int i = 0; i < D / 2; i++) {
    float first = x[i], second = x[i + D / 2];
    out[i] = first * cos[i] - second * sin[i];
    out[i + D / 2] = second * cos[i] + first * sin[i];
  }
}

// -------------------------------------------------------------------------------- attention

// The blocks of one sequence in a layer's store, seen by one kv head.
struct Pages {
  const Store& store;
  const int32_t* table;
  int block_size, K, D, head;

  size_t place(int token) const {  // of its slot and this head
    size_t slot = size_t(table[token / block_size]) * block_size + token % block_size;
    return slot * K + head;
  }
  bf16* key(size_t place) const { return (bf16*)store.keys + place * D; }
  bf16* value(size_t place) const { return (bf16*)store.values + place * D; }
  int8_t* key8(size_t place) const { return (int8_t*)store.keys + place * D; }
  int8_t* value8(size_t place) const { return (int8_t*)store.values + place * D; }
};

struct AttentionScratch {
  std::vector<bf16> q, p, keys, values, key_rows, value_rows;
  std::vector<float> scores, out, most, sum;
};

#if FAST
// c (M, 16 V) += a (M, 2 pairs) · b, where b holds for each pair of rows all columns' two values.
template <int M, int V>
void bf16_block(const bf16* a, size_t a_row, const bf16* b, size_t b_pair, int pairs, float* c,
                size_t c_row, bool fresh) {
  __m512 sum[M][V];
  EACH(m, M)
    EACH(v, V)
      sum[m][v] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(c + m * c_row + 16 * v);
  for (int p = 0; p < pairs; p++) {
    __m512bh columns[V];
    EACH(v, V)
      columns[v] = (__m512bh)_mm512_loadu_si512(b + p * b_pair + 32 * v);
    EACH(m, M) {
      int32_t two;
      std::memcpy(&two, a + m * a_row + 2 * p, 4);
      __m512bh row = (__m512bh)_mm512_set1_epi32(two);
      EACH(v, V) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], row, columns[v]);
    }
  }
  EACH(m, M)
    EACH(v, V) _mm512_storeu_ps(c + m * c_row + 16 * v, sum[m][v]);
}
#endif

// c (rows, columns) = or += a (rows, depth) · b, b packed in pairs: (depth / 2, columns, 2).
void bf16_product(const bf16* a, int rows, int depth, const bf16* b, int columns, float* c,
                  bool fresh) {
#if FAST
  for (int v = 0; v < columns; v += 64) {
    int wide = std::min(4, (columns - v) / 16);
    for (int m = 0; m < rows;) {
      const bf16* from = a + size_t(m) * depth;
      float* to = c + size_t(m) * columns + v;
      int tall = rows - m >= 6 ? 6 : 1;
#define CASE(M, V)                                                                              \
  if (tall == M && wide == V)                                                                   \
    bf16_block<M, V>(from, depth, b + 2 * v, 2 * columns, depth / 2, to, columns, fresh);
      CASE(6, 4) CASE(6, 3) CASE(6, 2) CASE(6, 1) CASE(1, 4) CASE(1, 3) CASE(1, 2) CASE(1, 1)
#undef CASE
      m += tall;
    }
  }
#else
  for (int m = 0; m < rows; m++)
    for (int v = 0; v < columns; v++) {
      float sum = fresh ? 0 : c[size_t(m) * columns + v];
      for (int d = 0; d < depth; d++)
        sum += widen(a[size_t(m) * depth + d]) *
               widen(b[(size_t(d / 2) * columns + v) * 2 + d % 2]);
      c[size_t(m) * columns + v] = sum;
    }
#endif
}

#if FAST
// 16 rows of 16 numbers to columns: out[column * stride + row].
void transpose(const uint32_t* const* rows, uint32_t* out, size_t stride) {
  __m512i a[16], b[16];
  EACH(i, 16) a[i] = _mm512_loadu_si512(rows[i]);
  EACH(i, 8) {
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
  EACH(i, 4) {
    a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
    a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
  }
  EACH(i, 4) {  // a[4 g + i] holds columns i, 4 + i, 8 + i, 12 + i of rows 4 g to 4 g + 3
    __m512i low = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88);
    __m512i odd = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
    __m512i high = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
    __m512i last = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
    _mm512_storeu_si512(out + i * stride, _mm512_shuffle_i32x4(low, high, 0x88));
    _mm512_storeu_si512(out + (4 + i) * stride, _mm512_shuffle_i32x4(odd, last, 0x88));
    _mm512_storeu_si512(out + (8 + i) * stride, _mm512_shuffle_i32x4(low, high, 0xdd));
    _mm512_storeu_si512(out + (12 + i) * stride, _mm512_shuffle_i32x4(odd, last, 0xdd));
  }
}

// Two rows of D numbers to pairs of one number of each.
void interleave(const bf16* first, const bf16* second, int D, bf16* out) {
  alignas(64) static const auto order = [] {
    std::array<std::array<uint16_t, 32>, 2> index;
    for (int i = 0; i < 64; i++) index[i / 32][i % 32] = uint16_t(i / 2 + 32 * (i % 2));
    return index;
  }();
  for (int d = 0; d < D; d += 32) {
    __m512i a = _mm512_loadu_si512(first + d), b = _mm512_loadu_si512(second + d);
    for (int half = 0; half < 2; half++)
      _mm512_storeu_si512(
          out + 2 * d + 32 * half,
          _mm512_permutex2var_epi16(a, _mm512_loadu_si512(order[half].data()), b));
  }
}
#endif

// A token's key, with the bias rotated to its position, and its value.
void dequantise_token(const Pages& pages, int token, size_t place, bf16* key, bf16* value) {
  const Store& store = pages.store;
  int D = pages.D;
  float row[MOST_D], scale = store.key_scale[place];
  size_t angles = size_t(token) * (D / 2);
  rotate(store.bias + pages.head * D, store.cos + angles, store.sin + angles, D, row);
  const int8_t *k = pages.key8(place), *v = pages.value8(place);
  for (int d = 0; d < D; d++) row[d] += float(k[d]) * scale;
  narrow_row(row, D, key);
  scale = store.value_scale[place];
  for (int d = 0; d < D; d++) row[d] = float(v[d]) * scale;
  narrow_row(row, D, value);
}

// Keys [begin, begin + count) as (D / 2, KEYS, 2), values as (KEYS / 2, D, 2); zeros after them.
void pack(const Pages& pages, int begin, int count, AttentionScratch& s) {
  int D = pages.D;
  const bf16 *keys[KEYS], *values[KEYS], zeros[MOST_D] = {};
  if (pages.store.key_scale) s.key_rows.resize(KEYS * D), s.value_rows.resize(KEYS * D);
  for (int j = 0; j < KEYS; j++) {
    keys[j] = values[j] = zeros;
    if (j >= count) continue;
    size_t place = pages.place(begin + j);
    keys[j] = pages.store.key_scale ? &s.key_rows[j * D] : pages.key(place);
    values[j] = pages.store.key_scale ? &s.value_rows[j * D] : pages.value(place);
    if (pages.store.key_scale)
      dequantise_token(pages, begin + j, place, &s.key_rows[j * D], &s.value_rows[j * D]);
  }
#if FAST
  for (int j = 0; j < KEYS; j += 16)
    for (int d = 0; d < D; d += 32) {
      const uint32_t* rows[16];
      EACH(i, 16) rows[i] = (const uint32_t*)(keys[j + i] + d);
      transpose(rows, (uint32_t*)s.keys.data() + size_t(d / 2) * KEYS + j, KEYS);
    }
  for (int j = 0; j < KEYS; j += 2)
    interleave(values[j], values[j + 1], D, s.values.data() + size_t(j) * D);
#else
  for (int j = 0; j < KEYS; j++)
    for (int d = 0; d < D; d++) {
      s.keys[(size_t(d / 2) * KEYS + j) * 2 + d % 2] = keys[j][d];
      s.values[(size_t(j / 2) * D + d) * 2 + j % 2] = values[j][d];
    }
#endif
}

// Scores of one row and one block of keys to probabilities, under the running maximum.
// Returns what the row's earlier sum and output are to be multiplied by.
float soften(float* scores, int seen, float scale, float& most, float& sum, bf16* p) {
#if FAST
  __m512 s[KEYS / 16], top = _mm512_set1_ps(-INFINITY), by = _mm512_set1_ps(scale);
  for (int v = 0; v < KEYS / 16; v++) {
    int left = std::min(16, std::max(0, seen - 16 * v));
    __mmask16 in = (1u << left) - 1;
    s[v] = _mm512_mask_mul_ps(_mm512_set1_ps(-INFINITY), in, _mm512_loadu_ps(scores + 16 * v), by);
    top = _mm512_max_ps(top, s[v]);
  }
  float now = std::max(most, _mm512_reduce_max_ps(top));
  __m512 all = _mm512_setzero_ps(), less = _mm512_set1_ps(now);
  for (int v = 0; v < KEYS / 16; v++) {
    s[v] = exponential(_mm512_sub_ps(s[v], less));
    all = _mm512_add_ps(all, s[v]);
    _mm256_storeu_si256((__m256i*)(p + 16 * v), (__m256i)_mm512_cvtneps_pbh(s[v]));
  }
  float added = _mm512_reduce_add_ps(all);
#else
  float now = most, added = 0;
  for (int j = 0; j < seen; j++) now = std::max(now, scores[j] * scale);
  for (int j = 0; j < KEYS; j++) {
    float value = j < seen ? std::exp(scores[j] * scale - now) : 0;
    added += value;
    p[j] = narrow(value);
  }
#endif
  float keep = std::exp(most - now);
  most = now;
  sum = sum * keep + added;
  return keep;
}

// Softmax attention of `rows` queries, s.q (rows, D): row i sees limits(i) keys. Into s.out.
template <class Limits>
void attend(const Pages& pages, int rows, Limits limits, AttentionScratch& s) {
  int D = pages.D, longest = 0;
  float scale = 1 / std::sqrt(float(D));
  s.p.resize(size_t(rows) * KEYS), s.scores.resize(size_t(rows) * KEYS);
  s.keys.resize(size_t(D) * KEYS), s.values.resize(size_t(D) * KEYS);
  s.out.assign(size_t(rows) * D, 0), s.most.assign(rows, -INFINITY), s.sum.assign(rows, 0);
  for (int i = 0; i < rows; i++) longest = std::max(longest, int(limits(i)));
  for (int begin = 0; begin < longest; begin += KEYS) {
    pack(pages, begin, std::min(KEYS, longest - begin), s);
    bf16_product(s.q.data(), rows, D, s.keys.data(), KEYS, s.scores.data(), true);
    for (int i = 0; i < rows; i++) {
      bf16* p = &s.p[size_t(i) * KEYS];
      int seen = std::min(KEYS, limits(i) - begin);
      if (seen <= 0) {
        std::fill(p, p + KEYS, 0);
        continue;
      }
      float keep = soften(&s.scores[size_t(i) * KEYS], seen, scale, s.most[i], s.sum[i], p);
      if (keep != 1)
        for (int d = 0; d < D; d++) s.out[size_t(i) * D + d] *= keep;
    }
    bf16_product(s.p.data(), rows, KEYS, s.values.data(), D, s.out.data(), false);
  }
  for (int i = 0; i < rows; i++)
    for (int d = 0; d < D; d++) s.out[size_t(i) * D + d] /= s.sum[i];
}

// ------------------------------------------------------------------------------------- step

struct Pass {  // what the threads of a step share
  std::vector<float> x, qkv, attended, gate, up;
  std::vector<Rows> rows;  // of each product in turn
};

struct Own {  // what each has for itself
  Inputs in;
  std::vector<float> row;
  AttentionScratch attention;
};

void normed(const float* x, const float* weight, const Model& model, int n, Format format,
            Own& own) {
  int C = model.C;
  own.row.resize(std::max(int(own.row.size()), C));
  resize(format, n, C, own.in);
  for (int m = 0; m < n; m++) {
    rms_norm(x + size_t(m) * C, weight, C, model.eps, own.row.data());
    prepare_row(format, own.row.data(), m, own.in);
  }
}

// Rotate and store the key and value of a sequence's new tokens in one kv head.
void remember(const Model& model, const Layer& layer, const Batch& batch, int sequence, int head,
              const Pass& pass, Own& own) {
  int H = model.H, K = model.K, D = model.D;
  const int32_t* table = batch.tables + size_t(sequence) * batch.table_width;
  Pages pages{layer.store, table, model.block_size, K, D, head};
  own.row.resize(std::max(int(own.row.size()), D));
  for (int token = batch.starts[sequence]; token < batch.starts[sequence + 1]; token++) {
    int position = batch.positions[token];
    const float* qkv = &pass.qkv[size_t(token) * (H + 2 * K) * D];
    const float* cos = model.cos + size_t(position) * (D / 2);
    const float* sin = model.sin + size_t(position) * (D / 2);
    size_t place = pages.place(position);
    const float *k = qkv + (H + head) * D, *v = qkv + (H + K + head) * D;
    float bare[MOST_D], *rotated = own.row.data();
    if (layer.store.key_scale) {
      for (int d = 0; d < D; d++) bare[d] = k[d] - layer.store.bias[head * D + d];
      rotate(bare, cos, sin, D, rotated);
      layer.store.key_scale[place] = quantise_row(rotated, D, pages.key8(place));
      layer.store.value_scale[place] = quantise_row(v, D, pages.value8(place));
    } else {
      rotate(k, cos, sin, D, rotated);
      narrow_row(rotated, D, pages.key(place));
      narrow_row(v, D, pages.value(place));
    }
  }
}

// Attention of one sequence's new tokens in the query heads of one kv head.
void attend_sequence(const Model& model, const Layer& layer, const Batch& batch, int sequence,
                     int head, Pass& pass, Own& own) {
  int H = model.H, K = model.K, D = model.D, G = H / K, width = (H + 2 * K) * D;
  int first = batch.starts[sequence], count = batch.starts[sequence + 1] - first;
  const int32_t* table = batch.tables + size_t(sequence) * batch.table_width;
  Store store = layer.store;
  store.cos = model.cos, store.sin = model.sin;
  Pages pages{store, table, model.block_size, K, D, head};
  AttentionScratch& s = own.attention;
  own.row.resize(std::max(int(own.row.size()), D));
  s.q.resize(size_t(count) * G * D);
  for (int m = 0; m < count; m++) {
    const float* qkv = &pass.qkv[size_t(first + m) * width];
    size_t angles = size_t(batch.positions[first + m]) * (D / 2);
    for (int g = 0; g < G; g++) {
      rotate(qkv + (head * G + g) * D, model.cos + angles, model.sin + angles, D, own.row.data());
      narrow_row(own.row.data(), D, &s.q[size_t(m * G + g) * D]);
    }
  }
  attend(pages, count * G, [&](int i) { return batch.positions[first + i / G] + 1; }, s);
  for (int m = 0; m < count; m++)
    std::copy_n(&s.out[size_t(m) * G * D], G * D,
                &pass.attended[(size_t(first + m) * H + head * G) * D]);
}

void embed(const Model& model, int token, float* out) {
  const Matrix& e = model.embedding;
  if (e.format == BF16) {
    const bf16* row = (const bf16*)e.weight + size_t(token) * e.k;
    for (int i = 0; i < e.k; i++) out[i] = widen(row[i]);
  } else {
    const int8_t* row = (const int8_t*)e.weight + size_t(token) * e.k;
    for (int i = 0; i < e.k; i++) out[i] = float(row[i]) * e.scale[token];
  }
}

void step_thread(const Model& model, const Batch& batch, Pool& pool, Pass& pass, Own& own, int t) {
  int n = batch.n, C = model.C, I = model.I, T = pool.threads();
  int width = (model.H + 2 * model.K) * model.D, heads = model.H * model.D;
  float* x = pass.x.data();
  Rows* rows = pass.rows.data();
  Share some;
  for (int m = t; m < n; m += T) embed(model, batch.tokens[m], x + size_t(m) * C);
  pool.barrier();
  for (int l = 0; l < model.layers; l++) {
    const Layer& layer = model.layer[l];
    normed(x, layer.input_norm, model, n, layer.qkv.format, own);
    while (rows->take(width, T, some))
      linear(layer.qkv, own.in, some, pass.qkv.data(), width, false);
    rows++;
    pool.barrier();
    // All keys are written before any is read: sequences may share a prefix that is new to both.
    for (int i = t; i < batch.sequences * model.K; i += T)
      remember(model, layer, batch, i / model.K, i % model.K, pass, own);
    if (model.K % T) pool.barrier();  // else a thread reads only heads that it has written itself
    for (int i = t; i < batch.sequences * model.K; i += T)
      attend_sequence(model, layer, batch, i / model.K, i % model.K, pass, own);
    pool.barrier();
    prepare(layer.o.format, pass.attended.data(), n, heads, own.in);
    while (rows->take(C, T, some)) linear(layer.o, own.in, some, x, C, true);
    rows++;
    pool.barrier();
    normed(x, layer.post_norm, model, n, layer.gate_up.format, own);
    // A thread computes the same rows of gate and up, so it can multiply them itself.
    while (rows->take(I, T, some)) {
      linear(layer.gate_up, own.in, some, pass.gate.data(), I, false);
      linear(lower_half(layer.gate_up), own.in, some, pass.up.data(), I, false);
      for (int m = 0; m < n; m++) {
        size_t at = size_t(m) * I + some.begin;
        swiglu_row(&pass.gate[at], &pass.up[at], some.end - some.begin);
      }
    }
    rows++;
    pool.barrier();
    prepare(layer.down.format, pass.gate.data(), n, I, own.in);
    while (rows->take(C, T, some)) linear(layer.down, own.in, some, x, C, true);
    rows++;
    pool.barrier();
  }
  own.row.resize(std::max(int(own.row.size()), C));
  resize(model.head.format, batch.rows, C, own.in);
  for (int r = 0; r < batch.rows; r++) {
    rms_norm(x + size_t(batch.wanted[r]) * C, model.norm, C, model.eps, own.row.data());
    prepare_row(model.head.format, own.row.data(), r, own.in);
  }
  while (rows->take(model.V, T, some))
    linear(model.head, own.in, some, batch.logits, model.V, false);
}

Pool* pool = nullptr;
Pool alone(1);
std::vector<Own> own;
Pass pass;

}  // namespace

// --------------------------------------------------------------------------------- interface
// Not for several threads at once: the caller holds a lock.

extern "C" {

int32_t fast() { return FAST; }

// What this file was compiled for, in the names of /proc/cpuinfo: a processor without it must not
// run it.
const char* needs() {
  return ""
#ifdef __AVX2__
         "avx2 fma "
#endif
#ifdef __AVX512F__
         "avx512f "
#endif
#if FAST
         "avx512bw avx512vl avx512_vnni avx512_bf16 "
#endif
      ;
}

void set_threads(int32_t threads) {
  if (pool && pool->threads() == threads) return;
  delete pool;
  pool = new Pool(threads);
  own.resize(threads);
}

void step(const Model* model, const Batch* batch) {
  size_t n = batch->n;
  pass.x.resize(n * model->C);
  pass.qkv.resize(n * (model->H + 2 * model->K) * model->D);
  pass.attended.resize(n * model->H * model->D);
  pass.gate.resize(n * model->I);
  pass.up.resize(n * model->I);
  pass.rows = std::vector<Rows>(4 * model->layers + 1);
  // A miniature is computed by one thread in less time than threads need to meet.
  size_t weights = size_t(model->layers) * model->C * (3 * model->I + 2 * model->C);
  Pool& crew = weights * n < SMALL ? alone : *pool;
  crew.run([&](int t) { step_thread(*model, *batch, crew, pass, own[t], t); });
}

// x (m, k) floats times w, plus bias -> out (m, n).
void product(const Matrix* w, const float* x, int32_t m, float* out) {
  Rows rows;
  pool->run([&](int t) {
    prepare(w->format, x, m, w->k, own[t].in);
    for (Share some; rows.take(w->n, pool->threads(), some);)
      linear(*w, own[t].in, some, out, w->n, false);
  });
}

// q (n, H, D), rotated, of the last n of `length` tokens in `slots` -> out (n, H, D).
void attention(const bf16* q, const Store* store, const int32_t* slots, int32_t n, int32_t length,
               int32_t H, int32_t K, int32_t D, bf16* out) {
  constexpr int TOKENS = 32;  // queries that share the packing of their keys
  int G = H / K, blocks = (n + TOKENS - 1) / TOKENS;
  std::atomic<int> next{0};
  pool->run([&](int t) {
    AttentionScratch& s = own[t].attention;
    // The last queries see most keys: they go first, so that no thread is left with a long one.
    for (int i; (i = next.fetch_add(1)) < blocks * K;) {
      int head = i % K, begin = (blocks - 1 - i / K) * TOKENS, count = std::min(TOKENS, n - begin);
      Pages pages{*store, slots, 1, K, D, head};
      s.q.resize(size_t(count) * G * D);
      for (int m = 0; m < count; m++)
        std::copy_n(q + (size_t(begin + m) * H + head * G) * D, G * D, &s.q[size_t(m) * G * D]);
      attend(pages, count * G, [&](int r) { return length - n + begin + r / G + 1; }, s);
      for (int m = 0; m < count; m++)
        narrow_row(&s.out[size_t(m) * G * D], G * D,
                   out + (size_t(begin + m) * H + head * G) * D);
    }
  });
}

// x (m, k) -> out (m, k) and scale (m,), as quantise_row.
void quantise(const bf16* x, int32_t m, int32_t k, int8_t* out, float* scale) {
  pool->run([&](int t) {
    auto& row = own[t].row;
    row.resize(std::max(int(row.size()), k));
    for (int i = t; i < m; i += pool->threads()) {
      widen_row(x + size_t(i) * k, k, row.data());
      scale[i] = quantise_row(row.data(), k, out + size_t(i) * k);
    }
  });
}

// An int4 weight (n, k) -> out (n, k).
void dequantise_int4(const uint8_t* weight, const fp16* scale, const fp16* minimum, int32_t n,
                     int32_t k, bf16* out) {
  pool->run([&](int t) {
    auto& row = own[t].row;
    row.resize(std::max(int(row.size()), k));
    for (int i = t; i < n; i += pool->threads()) {
      for (int g = 0; g < k / GROUP; g++) {
        size_t group = size_t(i) * (k / GROUP) + g;
        const uint8_t* at = weight + size_t(i) * (k / 2) + g * GROUP / CHUNK * (CHUNK / 2);
        float by = half(scale[group]), from = half(minimum[group]);
        int shift = g * GROUP % CHUNK ? 4 : 0;
        for (int j = 0; j < GROUP; j++)
          row[g * GROUP + j] = float((at[j] >> shift) & 15) * by + from;
      }
      narrow_row(row.data(), k, out + size_t(i) * k);
    }
  });
}

// 128 times the sum of each row of an int8 weight (n, k).
void sum_rows(const int8_t* weight, int32_t n, int32_t k, int32_t* out) {
  pool->run([&](int t) {
    for (int i = t; i < n; i += pool->threads()) {
      int32_t sum = 0;
      for (int j = 0; j < k; j++) sum += weight[size_t(i) * k + j];
      out[i] = 128 * sum;
    }
  });
}

// Integer products (m, n) -> out = products * x_scale (m,) * w_scale (n,) + bias (n,) or null.
void scale_products(const int32_t* products, const float* x_scale, const float* w_scale,
                    const float* bias, int32_t m, int32_t n, bf16* out) {
  pool->run([&](int t) {
    auto& row = own[t].row;
    row.resize(std::max(int(row.size()), n));
    for (int i = t; i < m; i += pool->threads()) {
      const int32_t* from = products + size_t(i) * n;
      for (int j = 0; j < n; j++) row[j] = float(from[j]) * x_scale[i] * w_scale[j];
      if (bias)
        for (int j = 0; j < n; j++) row[j] += bias[j];
      narrow_row(row.data(), n, out + size_t(i) * n);
    }
  });
}

// x (m, C) -> x / sqrt(mean(x²) + eps) * weight (C,)
void norm(const bf16* x, const bf16* weight, int32_t m, int32_t C, float eps, bf16* out) {
  pool->run([&](int t) {
    auto& row = own[t].row;
    row.resize(std::max(int(row.size()), 2 * C));
    float* wide = row.data() + C;
    widen_row(weight, C, wide);
    for (int i = t; i < m; i += pool->threads()) {
      widen_row(x + size_t(i) * C, C, row.data());
      rms_norm(row.data(), wide, C, eps, row.data());
      narrow_row(row.data(), C, out + size_t(i) * C);
    }
  });
}

// x (m, heads, D), rows `stride` apart, by cos and sin (m, D/2) -> out (m, heads, D)
void rotate_heads(const bf16* x, int64_t stride, const bf16* cos, const bf16* sin, int32_t m,
                  int32_t heads, int32_t D, bf16* out) {
  pool->run([&](int t) {
    float angles[MOST_D], head[MOST_D], turned[MOST_D];
    for (int i = t; i < m; i += pool->threads()) {
      widen_row(cos + size_t(i) * (D / 2), D / 2, angles);
      widen_row(sin + size_t(i) * (D / 2), D / 2, angles + D / 2);
      for (int h = 0; h < heads; h++) {
        widen_row(x + i * stride + h * D, D, head);
        rotate(head, angles, angles + D / 2, D, turned);
        narrow_row(turned, D, out + (size_t(i) * heads + h) * D);
      }
    }
  });
}

// gate_up (m, 2 width) -> silu(gate) * up (m, width).
void swiglu(const bf16* gate_up, int32_t m, int32_t width, bf16* out) {
  pool->run([&](int t) {
    auto& row = own[t].row;
    row.resize(std::max(int(row.size()), 2 * width));
    for (int i = t; i < m; i += pool->threads()) {
      widen_row(gate_up + size_t(i) * 2 * width, 2 * width, row.data());
      swiglu_row(row.data(), row.data() + width, width);
      narrow_row(row.data(), width, out + size_t(i) * width);
    }
  });
}

}  // extern "C"
