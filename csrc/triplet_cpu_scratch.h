// Memory that each thread keeps for the kernels' short-lived arrays: asking the system for each anew costs more than a
// small batch's arithmetic.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace triplet {

// Arrays are given back in the reverse order of taking, as scopes end; what does not fit is allocated by itself.
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
