// A matrix product on tiles in vector registers, for instruction sets without tile registers.
#pragma once

namespace distkv {
namespace DISTKV_ISA {

struct RegisterTile {
  static constexpr int kRows = 6;                // query rows of a tile
  static constexpr int kPanel = kColumns * W;    // columns of a packed panel
  static constexpr int kTokens = 16;             // a tile computes whole multiples of this many tokens
  static constexpr int kDepth = W;               // and of this many numbers of a key
  static constexpr int kAhead = 4;               // tokens to prefetch per product
  static constexpr int64_t kItemRows = 192;      // query rows for which keys and values are packed once
  static constexpr bool kBesideVectors = false;  // whether products run while vectors compute something else

  struct Session {};  // what a thread holds while it multiplies

  // c[m][n] (+)= a[m] . b over `steps`, for one tile; the panel b holds kPanel columns per step. The last tile may hold
  // fewer rows: 16 questions of group 4 are ten tiles of 6 and one of 4.
  template <class M, bool Add>
  static void product(int rows, int columns, const typename M::Query* a, int64_t lda, const typename M::Query* b,
                      int steps, float* c, int64_t ldc) {
    const int vectors = columns < kPanel ? (columns + W - 1) / W : kColumns;
    if (rows <= 2) return product_columns<M, 2, Add>(vectors, a, lda, b, steps, c, ldc);
    if (rows <= 4) return product_columns<M, 4, Add>(vectors, a, lda, b, steps, c, ldc);
    return product_columns<M, kRows, Add>(vectors, a, lda, b, steps, c, ldc);
  }

 private:
  template <class M, int Rows, bool Add>
  static void product_columns(int vectors, const typename M::Query* a, int64_t lda, const typename M::Query* b, int steps,
                              float* c, int64_t ldc) {
    switch (vectors) {
      case 1: return multiply<M, Rows, 1, Add>(a, lda, b, steps, c, ldc);
      case 2: return multiply<M, Rows, 2, Add>(a, lda, b, steps, c, ldc);
      case 3: return multiply<M, Rows, kColumns < 3 ? kColumns : 3, Add>(a, lda, b, steps, c, ldc);
      default: return multiply<M, Rows, kColumns, Add>(a, lda, b, steps, c, ldc);
    }
  }

  template <class M, int Rows, int Columns, bool Add>
  static inline void multiply(const typename M::Query* a, int64_t lda, const typename M::Query* b, int steps, float* c,
                              int64_t ldc) {
    F sum[Rows][Columns];
    DISTKV_UNROLL
    for (int m = 0; m < Rows; ++m)
      DISTKV_UNROLL
      for (int n = 0; n < Columns; ++n) sum[m][n] = Add ? load(c + m * ldc + n * W) : zero();
    for (int k = 0; k < steps; ++k, b += kPanel * M::kStep, a += M::kStep) {
      typename M::Vec right[Columns];
      DISTKV_UNROLL
      for (int n = 0; n < Columns; ++n) right[n] = M::load_packed(b + n * W * M::kStep);
      DISTKV_UNROLL
      for (int m = 0; m < Rows; ++m) {
        const typename M::Vec left = M::broadcast(a + m * lda);
        DISTKV_UNROLL
        for (int n = 0; n < Columns; ++n) sum[m][n] = M::multiply_add(sum[m][n], left, right[n]);
      }
    }
    DISTKV_UNROLL
    for (int m = 0; m < Rows; ++m)
      DISTKV_UNROLL
      for (int n = 0; n < Columns; ++n) store(c + m * ldc + n * W, sum[m][n]);
  }
};

}  // namespace DISTKV_ISA
}  // namespace distkv
