// Status: how every public function of libkdq reports what went wrong.
//
// No exception crosses the library's boundary. Bindings turn a Status into ValueError (kInvalidArgument)
// or RuntimeError (everything else); the message names the argument, what came and what was expected.
#pragma once

#include <string>
#include <utility>

#if defined(_WIN32)
#define KDQ_API
#else
#define KDQ_API __attribute__((visibility("default")))
#endif

namespace kdq {

enum class StatusCode : int {
  kOk = 0,
  kInvalidArgument = 1,  // the caller passed something that cannot be right
  kUnsupported = 2,      // right, but not on this machine or in this build
  kInternal = 3,         // out of memory and the like
};

class [[nodiscard]] Status {
 public:
  Status() = default;  // ok; allocates nothing
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  static Status invalid(std::string message) { return {StatusCode::kInvalidArgument, std::move(message)}; }
  static Status unsupported(std::string message) { return {StatusCode::kUnsupported, std::move(message)}; }
  static Status internal(std::string message) { return {StatusCode::kInternal, std::move(message)}; }

  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

}  // namespace kdq
