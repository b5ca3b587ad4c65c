#include "tiers/async_file.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#ifdef __linux__
#include <linux/aio_abi.h>
#include <sys/syscall.h>

#include <ctime>
#endif

namespace tael {

AsyncFile::AsyncFile(int fd, [[maybe_unused]] int max_in_flight) : fd_(fcntl(fd, F_DUPFD_CLOEXEC, 0)) {
  if (fd_ < 0) throw std::system_error(errno, std::generic_category(), "fcntl");
#ifdef __linux__
  if (syscall(SYS_io_setup, max_in_flight, &context_) != 0) context_ = 0;
#endif
}

AsyncFile::~AsyncFile() {
#ifdef __linux__
  if (context_ != 0) syscall(SYS_io_destroy, context_);
#endif
  close(fd_);
}

// At once, by the calling thread.
void AsyncFile::run(const FileOp& op) {
  const ssize_t moved = op.is_write ? pwrite(fd_, op.data, op.bytes, op.offset) : pread(fd_, op.data, op.bytes, op.offset);
  const FileResult result{op.tag, moved < 0 ? -int64_t(errno) : int64_t(moved)};
  const std::lock_guard lock(mutex_);
  done_.push_back(result);
}

int AsyncFile::take_done(FileResult* out, int most) {
  const std::lock_guard lock(mutex_);
  const int count = std::min(most, int(done_.size()));
  std::copy_n(done_.end() - count, count, out);
  done_.resize(done_.size() - count);
  return count;
}

#ifdef __linux__

void AsyncFile::submit(const FileOp* ops, int count) {
  constexpr int kBatch = 64;
  int next = 0;
  while (context_ != 0 && next < count) {
    const int size = std::min(kBatch, count - next);
    iocb requests[kBatch] = {};
    iocb* pointers[kBatch];
    for (int i = 0; i < size; ++i) {
      const FileOp& op = ops[next + i];
      requests[i].aio_data = uint64_t(op.tag);
      requests[i].aio_lio_opcode = op.is_write ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
      requests[i].aio_fildes = uint32_t(fd_);
      requests[i].aio_buf = uint64_t(op.data);
      requests[i].aio_nbytes = uint64_t(op.bytes);
      requests[i].aio_offset = op.offset;
      pointers[i] = &requests[i];
    }
    const long taken = syscall(SYS_io_submit, context_, long(size), pointers);
    if (taken <= 0) break;  // the first of them is wrong, or the kernel is short of memory
    next += int(taken);
  }
  for (; next < count; ++next) run(ops[next]);
}

int AsyncFile::wait(FileResult* out, int most) {
  constexpr int kBatch = 64;
  io_event events[kBatch];
  for (;;) {
    if (const int count = take_done(out, most)) return count;
    if (context_ == 0) continue;
    timespec patience{0, 10'000'000};  // what is submitted meanwhile may be done at once
    const long count = syscall(SYS_io_getevents, context_, 1L, long(std::min(most, kBatch)), events, &patience);
    for (long i = 0; i < count; ++i) out[i] = {int64_t(events[i].data), int64_t(events[i].res)};
    if (count > 0) return int(count);
  }
}

#else

void AsyncFile::submit(const FileOp* ops, int count) {
  for (int i = 0; i < count; ++i) run(ops[i]);
}

int AsyncFile::wait(FileResult* out, int most) {
  for (;;)
    if (const int count = take_done(out, most)) return count;
}

#endif

}  // namespace tael
