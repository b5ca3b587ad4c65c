// Reads and writes of a file that go on while the caller does something else.
//
// On Linux by the kernel's asynchronous I/O, which takes many at once and needs no thread for files
// that are opened with O_DIRECT. Elsewhere, or where the kernel refuses, each is done when it is
// submitted.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

namespace tael {

struct FileOp {
  bool is_write;
  int64_t offset;
  uint8_t* data;
  int64_t bytes;
  int64_t tag;  // the caller's
};

struct FileResult {
  int64_t tag;
  int64_t result;  // bytes moved, or -errno
};

class AsyncFile {
 public:
  // The file may be closed afterwards. No more than max_in_flight operations may be under way at a time.
  AsyncFile(int fd, int max_in_flight);
  ~AsyncFile();  // waits for what is under way
  AsyncFile(const AsyncFile&) = delete;
  AsyncFile& operator=(const AsyncFile&) = delete;

  // Whether the caller of submit() goes on meanwhile.
  bool is_asynchronous() const { return context_ != 0; }
  void submit(const FileOp* ops, int count);
  // Waits until an operation has ended, and returns how many of those that have were written to `out`, which
  // has room for `most`. Something must be under way or be submitted soon; one thread at a time may wait.
  int wait(FileResult* out, int most);

 private:
  void run(const FileOp& op);
  int take_done(FileResult* out, int most);

  const int fd_;  // its own
  unsigned long context_ = 0;  // of the kernel; 0: it refused
  std::mutex mutex_;
  std::vector<FileResult> done_;  // by run()
};

}  // namespace tael
