/* Files, read and written as a whole. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "internal.h"

int xct_file_map(struct xct_file *file, const char *path, struct xct_error *error)
{
    *file = (struct xct_file){0};
    int descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a FIFO is refused, not waited for */
    if (descriptor < 0)
        return xct_fail(error, XCT_ERROR_FILE, "cannot open %s: %s", path, strerror(errno));
    struct stat status;
    int code = XCT_OK;
    if (fstat(descriptor, &status) != 0)
        code = xct_fail(error, XCT_ERROR_FILE, "cannot examine %s: %s", path, strerror(errno));
    else if (!S_ISREG(status.st_mode) || status.st_size < 0 || (uint64_t)status.st_size > XCT_MAX_BYTES)
        code = xct_fail(error, XCT_ERROR_FILE, "%s is no regular file", path);
    else if (status.st_size > 0) { /* mmap refuses to map nothing */
        void *data = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_PRIVATE, descriptor, 0);
        if (data == MAP_FAILED)
            code = xct_fail(error, XCT_ERROR_FILE, "cannot map %s: %s", path, strerror(errno));
        else
            *file = (struct xct_file){data, (size_t)status.st_size};
    }
    close(descriptor); /* opened for reading: nothing can be lost */
    return code;
}

void xct_file_unmap(struct xct_file *file)
{
    if (file->data != NULL)
        munmap((void *)(uintptr_t)file->data, file->size);
    *file = (struct xct_file){0};
}

bool xct_file_absent(const char *path)
{
    return access(path, F_OK) != 0 && (errno == ENOENT || errno == ENOTDIR);
}

int xct_path_join(char *path, const char *directory, const char *name, struct xct_error *error)
{
    int length = snprintf(path, XCT_MAX_PATH_BYTES, "%s/%s", directory, name);
    if (length < 0 || length >= XCT_MAX_PATH_BYTES)
        return xct_fail(error, XCT_ERROR_ARGUMENT, "the path of the bundle is too long");
    return XCT_OK;
}

/* Takes the descriptor; whatever happens, it is closed. */
static bool write_all(int descriptor, const uint8_t *data, size_t size)
{
    bool good = true;
    while (good && size > 0) {
        ssize_t written = write(descriptor, data, size);
        good = written > 0 || (written < 0 && errno == EINTR);
        if (written > 0) {
            data += written;
            size -= (size_t)written;
        }
    }
    return close(descriptor) == 0 && good;
}

int xct_file_write(const char *path, const void *data, size_t size, struct xct_error *error)
{
    char aside[XCT_MAX_PATH_BYTES];
    int length = snprintf(aside, sizeof aside, "%s.XXXXXX", path);
    if (length < 0 || (size_t)length >= sizeof aside)
        return xct_fail(error, XCT_ERROR_ARGUMENT, "the path %s is too long", path);
    /* A name of its own: threads and processes may write the same file at once. */
    int descriptor = mkostemp(aside, O_CLOEXEC);
    if (descriptor < 0)
        return xct_fail(error, XCT_ERROR_FILE, "cannot create %s: %s", path, strerror(errno));
    if (write_all(descriptor, data, size) && rename(aside, path) == 0)
        return XCT_OK;
    int code = xct_fail(error, XCT_ERROR_FILE, "cannot write %s: %s", path, strerror(errno));
    (void)unlink(aside);
    return code;
}
