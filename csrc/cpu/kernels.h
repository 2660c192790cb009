// The CPU kernels: plain pointers in, plain pointers out. They are compiled once for each instruction set, in
// isa_<set>.cpp, between pragmas that allow it. There nothing of the standard library is instantiated: its templates
// would be shared with code for older processors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "triplet.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define TRIPLET_X86
#endif

// Of a function whose products are rounded before they are added. Clang fuses within a statement only.
#ifdef __clang__
#define TRIPLET_UNFUSED
#else
#define TRIPLET_UNFUSED __attribute__((optimize("fp-contract=off")))
#endif

namespace triplet {

// Classes are numbered from 0, and `order` lists the candidates class after class, ascending within a class; class c
// has order[starts[c]] .. order[starts[c + 1] - 1].
template <typename In>
struct Batch {
  const In* x;                         // (candidates, width), the anchors first
  int64_t anchors, candidates, width;  // anchors <= candidates
  const int32_t* class_of;             // (candidates,)
  const int32_t* order;                // (candidates,)
  const int32_t* starts;               // (classes + 1,)
  int64_t classes;

  const In* row(int64_t j) const { return x + j * width; }
};

// How kernels run on several threads: run(n, body, context) calls body(context, i) for each i in 0..n-1.
struct Threads {
  int64_t count;
  void (*run)(int64_t n, void (*body)(void*, int64_t), void* context);
};

// What a forward pass gives. A gradient is that of the reduced loss, its sum or its mean.
template <typename In, typename T>
struct Result {
  T* losses;                     // (anchors,), 0 where an anchor takes no part
  int64_t *positive, *negative;  // (anchors,) mined rows, -1 where an anchor takes no part; mining "all": -1
  int64_t total = 0;             // anchors or triplets that a mean is taken over
  In* gradient = nullptr;        // (gradient_rows, width), of the first candidates; null: not wanted
  int64_t gradient_rows = 0;     // anchors at least
};

// Arithmetic is in T: double for double, else float.
template <typename In, typename T>
struct Kernels {
  // Returns false if an embedding is not finite; the result is then of no use.
  bool (*forward)(const Batch<In>&, const Settings&, const Threads&, Result<In, T>&);
  // Gradients of the first candidates, (gradient_rows, width), from those of the anchors' losses (anchors,).
  void (*backward)(const Batch<In>&, const Settings&, const Threads&, const T* grad, const int64_t* positive,
                   const int64_t* negative, In* gradient, int64_t gradient_rows);
};

namespace avx512 {
template <typename In, typename T>
Kernels<In, T> kernels();
}

namespace avx512_bf16 {
Kernels<torch::headeronly::BFloat16, float> kernels();
}

namespace avx2 {
template <typename In, typename T>
Kernels<In, T> kernels();
}

namespace portable {
template <typename In, typename T>
Kernels<In, T> kernels();
}

// Memory that each thread keeps for the kernels' short-lived arrays: asking the system for each anew costs more than
// the arithmetic of a small batch. Arrays are given back in the reverse order of taking, as scopes end; what does not
// fit is allocated by itself.
class Arena {
 public:
  static void* take(size_t bytes) {
    Arena& arena = of_this_thread();
    const size_t size = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    if (size > kKept - arena.used) return allocate(size);
    if (arena.memory == nullptr) arena.memory = static_cast<char*>(allocate(kKept));
    arena.used += size;
    return arena.memory + arena.used - size;
  }

  static void give_back(void* array) {
    Arena& arena = of_this_thread();
    char* const at = static_cast<char*>(array);
    if (arena.memory != nullptr && at >= arena.memory && at < arena.memory + kKept) {
      arena.used = size_t(at - arena.memory);
    } else {
      std::free(array);
    }
  }

 private:
  static constexpr size_t kAlignment = 64;
#ifdef __SANITIZE_ADDRESS__
  static constexpr size_t kKept = 0;  // so that a step beyond an array is seen
#else
  static constexpr size_t kKept = size_t(512) << 10;
#endif

  char* memory = nullptr;
  size_t used = 0;

  ~Arena() { std::free(memory); }

  static Arena& of_this_thread() {
    static thread_local Arena arena;
    return arena;
  }

  static void* allocate(size_t size) {
    void* const found = std::aligned_alloc(kAlignment, size);
    if (found == nullptr) throw std::bad_alloc();
    return found;
  }
};

}  // namespace triplet
