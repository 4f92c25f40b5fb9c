/* Compiled programs, kept from one start to the next. A cache never makes an open fail: what cannot be read, or is not
 * what it should be, is not there, and what cannot be written is made anew the next time.
 *
 * The file is a struct cache_header and the program behind it. Its name has the first half of the key, so that
 * several devices can use one folder. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "internal.h"

#define MAX_PROGRAM_BYTES (UINT64_C(1) << 28)

struct cache_header {
    char magic[8];
    uint8_t key[32];
    uint8_t program_sha256[32];
    uint64_t program_bytes;
};

_Static_assert(sizeof(struct cache_header) == 80, "no padding in a cache's header");

static const char magic[8] = "XCTPROG"; /* and a zero byte */

/* $XCEPTILE_CACHE where it is set; else $XDG_CACHE_HOME/xceptile or ~/.cache/xceptile. Never beside a bundle: what came
 * with one in the same archive belongs to whoever unpacked it, and is nobody's whom the user trusts. */
static bool find_folder(char folder[XCT_MAX_PATH_BYTES])
{
    const char *chosen = getenv("XCEPTILE_CACHE"), *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    int length = -1;
    if (chosen != NULL && chosen[0] != 0)
        length = snprintf(folder, XCT_MAX_PATH_BYTES, "%s", chosen);
    else if (cache != NULL && cache[0] == '/')
        length = snprintf(folder, XCT_MAX_PATH_BYTES, "%s/xceptile", cache);
    else if (home != NULL && home[0] == '/')
        length = snprintf(folder, XCT_MAX_PATH_BYTES, "%s/.cache/xceptile", home);
    return length > 0 && length < XCT_MAX_PATH_BYTES;
}

/* Root, or who stands for it in a container, owns the root folder. On Android the system's accounts are those below the first app's (AID_APP_START), a group of the app's own has its
 * number, and that of its cache the number behind AID_CACHE_GID_START: private/android_filesystem_config.h. */
static bool trusts_owner(uid_t owner)
{
    struct stat root;
#ifdef __ANDROID__
    if (owner < 10000)
        return true;
#endif
    return owner == geteuid() || owner == 0 || (stat("/", &root) == 0 && owner == root.st_uid);
}

static bool trusts_group(gid_t group)
{
#ifdef __ANDROID__
    return group == geteuid() || group == geteuid() + 10000 || group < 10000;
#else
    (void)group; /* who else is in it is not known; containers give group 0 to everybody */
    return false;
#endif
}

static bool others_write(const struct stat *status)
{
    return (status->st_mode & S_IWOTH) != 0 || ((status->st_mode & S_IWGRP) != 0 && !trusts_group(status->st_gid));
}

/* Whether nobody but this user and the system can exchange what lies in a folder: it is the user's (or the system's, who
 * can do all), and neither there nor in a folder above it can another write. */
static bool is_private(const char *folder)
{
    char path[PATH_MAX];
    struct stat status;
    if (realpath(folder, path) == NULL)
        return false;
    for (bool above = false;; above = true) {
        if (stat(path, &status) != 0 || !S_ISDIR(status.st_mode) || !trusts_owner(status.st_uid))
            return false;
        /* In a sticky folder, such as /tmp, names are their owners'. */
        if (others_write(&status) && !(above && (status.st_mode & S_ISVTX) != 0))
            return false;
        char *slash = strrchr(path, '/');
        if (slash[1] == 0) /* the root */
            return true;
        slash[slash == path] = 0;
    }
}

/* A file that another may own or write to could be changed by him, wherever it lies. */
static bool is_private_file(const char *path)
{
    struct stat status;
    return lstat(path, &status) == 0 && S_ISREG(status.st_mode) && trusts_owner(status.st_uid) && !others_write(&status);
}

static bool file_name(char path[XCT_MAX_PATH_BYTES], const char *folder, const uint8_t key[32])
{
    struct xct_error ignored;
    char name[64] = "program-";
    for (size_t i = 0; i < 16; i++)
        snprintf(name + 8 + 2 * i, 3, "%02x", key[i]);
    strcat(name, ".cache");
    return xct_path_join(path, folder, name, &ignored) == XCT_OK;
}

/* The program in a file's bytes, copied, or NULL. */
static void *program_in(const struct xct_file *file, const uint8_t key[32], size_t *size)
{
    struct cache_header header;
    uint8_t digest[32];
    if (file->size <= sizeof header || file->size - sizeof header > MAX_PROGRAM_BYTES)
        return NULL;
    memcpy(&header, file->data, sizeof header);
    *size = file->size - sizeof header;
    if (memcmp(header.magic, magic, sizeof magic) != 0 || memcmp(header.key, key, sizeof header.key) != 0
        || header.program_bytes != *size)
        return NULL;
    /* A copy: what was checked must not change under the device's driver. */
    void *program = malloc(*size);
    if (program == NULL)
        return NULL;
    memcpy(program, file->data + sizeof header, *size);
    xct_sha256(program, *size, digest);
    if (memcmp(header.program_sha256, digest, sizeof digest) == 0)
        return program;
    free(program);
    return NULL;
}

void *xct_cache_read(const uint8_t key[32], size_t *size)
{
    char folder[XCT_MAX_PATH_BYTES], path[XCT_MAX_PATH_BYTES];
    struct xct_error ignored;
    struct xct_file file;
    if (!find_folder(folder) || !is_private(folder) || !file_name(path, folder, key) || !is_private_file(path)
        || xct_file_map(&file, path, &ignored) != XCT_OK)
        return NULL;
    void *program = program_in(&file, key, size);
    xct_file_unmap(&file);
    return program;
}

/* The folder and the one above it: ~/.cache may not be there yet. */
static void make_folder(char *folder)
{
    char *slash = strrchr(folder, '/');
    if (slash != NULL && slash != folder) {
        *slash = 0;
        (void)mkdir(folder, 0700);
        *slash = '/';
    }
    (void)mkdir(folder, 0700); /* one that is missing still shows when the file is written */
}

void xct_cache_write(const uint8_t key[32], const void *program, size_t size)
{
    char folder[XCT_MAX_PATH_BYTES], path[XCT_MAX_PATH_BYTES];
    struct cache_header header = {.program_bytes = size};
    struct xct_error ignored;
    if (size == 0 || size > MAX_PROGRAM_BYTES || !find_folder(folder))
        return;
    make_folder(folder);
    if (!is_private(folder) || !file_name(path, folder, key))
        return;
    uint8_t *data = malloc(sizeof header + size);
    if (data == NULL)
        return;
    memcpy(header.magic, magic, sizeof magic);
    memcpy(header.key, key, sizeof header.key);
    xct_sha256(program, size, header.program_sha256);
    memcpy(data, &header, sizeof header);
    memcpy(data + sizeof header, program, size);
    (void)xct_file_write(path, data, sizeof header + size, &ignored);
    free(data);
}
