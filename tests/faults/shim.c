/* Loaded with LD_PRELOAD: counts and logs the operations of a process on the files of a folder, and kills the process
   before one of them. Operations of C++ code are counted too, such as those of torch's writer of checkpoints.

   A line of the log is an operation: process, whether it succeeded, kind, path, inode, size, the path before a rename,
   and where a file that was replaced or removed is kept, for a power cut that undoes this. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static char root[PATH_MAX], graves[PATH_MAX], full[PATH_MAX], grave[PATH_MAX + 32]; /* one thread writes files */
static int log_fd = -1, halves;
static long count, stop_at;

/* Count from now on. Kill before operation number `stop`, from 1; if it writes and `half` is set, after half of it. */
void faults_arm(const char *folder, const char *kept, int log, long stop, int half) {
    strcpy(root, folder), strcpy(graves, kept);
    log_fd = log, stop_at = stop, halves = half;
}

/* Set `full` to the path of `path`, or of the open file `fd` if it is NULL. Return whether it is in the folder. */
static int ours(int fd, const char *path) {
    if (log_fd < 0 || fd == log_fd) return 0;
    if (!path || path[0] != '/') {
        char link[64];
        snprintf(link, sizeof link, fd == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", fd);
        ssize_t length = readlink(link, full, PATH_MAX - 1);
        full[length < 0 ? 0 : length] = 0;
        if (path) strcat(strcat(full, "/"), path);
    } else {
        strcpy(full, path);
    }
    return !strncmp(full, root, strlen(root));
}

static void die(void) { kill(getpid(), SIGKILL); }

static void begin(int writes) {
    grave[0] = 0;
    if (++count == stop_at && !(writes && halves)) die();
}

static void bury(void) { /* keep the file that is about to be replaced or removed */
    snprintf(grave, sizeof grave, "%s/%d-%ld", graves, getpid(), count);
    if (link(full, grave)) grave[0] = 0;
}

static int done(int failed, const char *kind, int fd, const char *from) {
    int error = errno;
    struct stat info = {0};
    if (fd >= 0) fstat(fd, &info);
    dprintf(log_fd, "%d\t%d\t%s\t%s\t%lu\t%ld\t%s\t%s\n", getpid(), !failed, kind, full,
            (unsigned long)info.st_ino, (long)info.st_size, from, grave);
    errno = error;
    return failed;
}

#define OPEN(name, declared, folder, ...)                                                        \
    int name declared {                                                                          \
        va_list rest;                                                                            \
        va_start(rest, flags);                                                                   \
        int mode = va_arg(rest, int);                                                            \
        va_end(rest);                                                                            \
        int writes = flags & (O_WRONLY | O_RDWR | O_CREAT);                                      \
        if (!writes || !ours(folder, path)) return REAL(name)(__VA_ARGS__);                      \
        begin(0);                                                                                \
        int nameless = (flags & O_TMPFILE) == O_TMPFILE, there = nameless || !access(full, F_OK); \
        int fd = REAL(name)(__VA_ARGS__);                                                        \
        done(fd < 0, there ? "open" : "create", fd, "");                                         \
        return fd;                                                                               \
    }
OPEN(open, (const char *path, int flags, ...), AT_FDCWD, path, flags, mode)
OPEN(open64, (const char *path, int flags, ...), AT_FDCWD, path, flags, mode)
OPEN(openat, (int at, const char *path, int flags, ...), at, at, path, flags, mode)
OPEN(openat64, (int at, const char *path, int flags, ...), at, at, path, flags, mode)

#define FOPEN(name)                                                                              \
    FILE *name(const char *path, const char *mode) {                                             \
        if (!strpbrk(mode, "wa+") || !ours(AT_FDCWD, path)) return REAL(name)(path, mode);       \
        begin(0);                                                                                \
        int there = !access(path, F_OK);                                                         \
        FILE *file = REAL(name)(path, mode);                                                     \
        done(!file, there ? "open" : "create", file ? fileno(file) : -1, "");                    \
        return file;                                                                             \
    }
FOPEN(fopen)
FOPEN(fopen64)

#define WRITE(name, declared, half, ...)                                                         \
    ssize_t name declared {                                                                      \
        if (!ours(fd, NULL)) return REAL(name)(__VA_ARGS__);                                     \
        begin(1);                                                                                \
        ssize_t written = count == stop_at ? half : REAL(name)(__VA_ARGS__);                     \
        done(written < 0, "write", fd, "");                                                      \
        if (count == stop_at) die();                                                             \
        return written;                                                                          \
    }
WRITE(write, (int fd, const void *data, size_t n), REAL(write)(fd, data, n / 2), fd, data, n)
WRITE(writev, (int fd, const struct iovec *parts, int n), REAL(write)(fd, parts->iov_base, parts->iov_len / 2), fd,
      parts, n)
WRITE(sendfile, (int fd, int from, off_t *at, size_t n), REAL(sendfile)(fd, from, at, 99), fd, from, at, n)
WRITE(sendfile64, (int fd, int from, off64_t *at, size_t n), REAL(sendfile64)(fd, from, at, 99), fd, from, at, n)

#define CALL(name, declared, folder, path, kind, fd, buried, ...)                                \
    int name declared {                                                                          \
        if (!ours(folder, path)) return REAL(name)(__VA_ARGS__);                                 \
        begin(0);                                                                                \
        if (buried) bury();                                                                      \
        return done(REAL(name)(__VA_ARGS__), kind, fd, "");                                      \
    }
CALL(fsync, (int fd), fd, NULL, "sync", fd, 0, fd)
CALL(fdatasync, (int fd), fd, NULL, "sync", fd, 0, fd)
CALL(ftruncate, (int fd, off_t size), fd, NULL, "truncate", fd, 0, fd, size)
CALL(ftruncate64, (int fd, off64_t size), fd, NULL, "truncate", fd, 0, fd, size)
CALL(mkdir, (const char *path, mode_t mode), AT_FDCWD, path, "mkdir", -1, 0, path, mode)
CALL(rmdir, (const char *path), AT_FDCWD, path, "rmdir", -1, 0, path)
CALL(unlink, (const char *path), AT_FDCWD, path, "unlink", -1, 1, path)
CALL(unlinkat, (int at, const char *path, int flags), at, path, flags ? "rmdir" : "unlink", -1, !flags, at, path, flags)

int rename(const char *from, const char *to) {
    if (!ours(AT_FDCWD, to)) return REAL(rename)(from, to);
    begin(0);
    bury();
    return done(REAL(rename)(from, to), "rename", -1, from);
}
