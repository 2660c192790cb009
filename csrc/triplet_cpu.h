// The CPU kernels as triplet_cpu.cpp sees them: plain pointers in, plain pointers out.
#pragma once

#include <cstdint>

#include "triplet.h"

namespace triplet {

// Candidates are the batch's own rows, then the others. Their classes are numbered from 0, and `order` lists them class
// after class, ascending within a class; class c has order[starts[c]] .. order[starts[c + 1] - 1].
template <typename In>
struct Batch {
  const In* own;     // (rows, width), the anchors
  const In* others;  // (other_rows, width)
  int64_t rows, other_rows, width;
  const int32_t* class_of;  // (candidates,)
  const int32_t* order;     // (candidates,)
  const int32_t* starts;    // (classes + 1,)
  int64_t classes;

  int64_t candidates() const { return rows + other_rows; }
  const In* row(int64_t j) const { return j < rows ? own + j * width : others + (j - rows) * width; }
};

// How kernels run on several threads: run(n, body, context) calls body(context, i) for each i in 0..n-1.
struct Threads {
  int64_t count;
  void (*run)(int64_t n, void (*body)(void*, int64_t), void* context);
};

// What a forward pass gives. Where the gradients are wanted, they are those of the reduced loss: its sum, or its mean.
template <typename In, typename T>
struct Result {
  T* losses;                     // (rows,), 0 where an anchor takes no part
  int64_t *positive, *negative;  // (rows,) mined rows, -1 where an anchor takes no part; mining "all": -1
  int64_t total = 0;             // anchors or triplets that a mean is taken over
  In *grad_own = nullptr, *grad_others = nullptr;  // (rows, width), (other_rows, width); null: not wanted
};

// Arithmetic is in T: double for double, else float.
template <typename In, typename T>
struct Kernels {
  // Returns false if an embedding is not finite; the result is then of no use.
  bool (*forward)(const Batch<In>&, const Settings&, const Threads&, Result<In, T>&);
  // Gradients of all candidates from those of the anchors' losses (rows,).
  void (*backward)(const Batch<In>&, const Settings&, const Threads&, const T* grad, const int64_t* positive,
                   const int64_t* negative, In* grad_own, In* grad_others);
};

// The kernels for the widest instruction set that this processor has.
template <typename In, typename T>
Kernels<In, T> kernels();

}  // namespace triplet
