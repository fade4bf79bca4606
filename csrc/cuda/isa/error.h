// What a launcher returns. The one header that both a kernel's file and the code that calls launchers include, which
// may know neither CUDA nor the emulator.
#pragma once
#include <string>
#include <utility>

using cudaStream_t = struct CUstream_st*;  // as CUDA declares it

namespace mmk::cuda {

// What went wrong, in words for the user; nothing if it is empty. `if (Error error = launch(...)) return error;`
class [[nodiscard]] Error {
  public:
    Error() = default;
    explicit Error(std::string message) : message_(std::move(message)) {}
    explicit operator bool() const { return !message_.empty(); }
    const std::string& message() const { return message_; }

  private:
    std::string message_;
};

}  // namespace mmk::cuda
