// Scratch memory of one thread, kept between calls: kernels are called once per layer, linears several times.
#pragma once
#include <cstdint>
#include <cstdlib>

namespace distkv {

class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  char* reserve(int64_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + 4095) / 4096 * 4096;
      data_ = static_cast<char*>(std::aligned_alloc(64, size_));
      if (!data_) size_ = 0;
    }
    return data_;
  }

 private:
  char* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace distkv
