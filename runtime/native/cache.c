/* Compiled programs, kept from one start to the next. A cache never makes an open fail: what cannot be read, or is not
 * what it should be, is not there, and what cannot be written is made anew the next time.
 *
 * The file is a struct cache_header and the program behind it. Its name has the first half of the key, so that
 * several devices can use one folder. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
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

/* BUNDLE.cache for the bundle that holds the plan: nothing is written into a bundle, which may be signed. False where
 * it cannot be, or where others than this user and root could have put programs into it. One that is not there is to be
 * written to only: who reads from it would take what another has put there since. */
static bool beside_bundle(char folder[XCT_MAX_PATH_BYTES], const char *directory, bool to_write)
{
    struct xct_error ignored;
    struct stat status;
    char bundle[XCT_MAX_PATH_BYTES], manifest[XCT_MAX_PATH_BYTES];
    if (realpath(directory, bundle) == NULL)
        return false;
    if (xct_path_join(manifest, bundle, "../manifest.json", &ignored) == XCT_OK && access(manifest, F_OK) == 0)
        *strrchr(bundle, '/') = 0; /* the plan lies in native/ */
    int length = snprintf(folder, XCT_MAX_PATH_BYTES, "%s.cache", bundle);
    if (bundle[0] == 0 || length < 0 || length >= XCT_MAX_PATH_BYTES)
        return false;
    if (lstat(folder, &status) != 0)
        return to_write && errno == ENOENT;
    return S_ISDIR(status.st_mode) && (status.st_uid == geteuid() || status.st_uid == 0)
           && (status.st_mode & (S_IWGRP | S_IWOTH)) == 0;
}

/* The folders to look in, the best first: $XCEPTILE_CACHE alone where it is set; else the one beside the bundle, and
 * where that cannot be had $XDG_CACHE_HOME/xceptile or ~/.cache/xceptile. Returns how many there are. */
static int find_folders(char folders[2][XCT_MAX_PATH_BYTES], const char *directory, bool to_write)
{
    const char *chosen = getenv("XCEPTILE_CACHE"), *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    int count = 0, length = -1;
    if (chosen != NULL && chosen[0] != 0) {
        length = snprintf(folders[0], XCT_MAX_PATH_BYTES, "%s", chosen);
        return length > 0 && length < XCT_MAX_PATH_BYTES ? 1 : 0;
    }
    count = beside_bundle(folders[0], directory, to_write) ? 1 : 0;
    if (cache != NULL && cache[0] == '/')
        length = snprintf(folders[count], XCT_MAX_PATH_BYTES, "%s/xceptile", cache);
    else if (home != NULL && home[0] == '/')
        length = snprintf(folders[count], XCT_MAX_PATH_BYTES, "%s/.cache/xceptile", home);
    return length > 0 && length < XCT_MAX_PATH_BYTES ? count + 1 : count;
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

void *xct_cache_read(const char *directory, const uint8_t key[32], size_t *size)
{
    char folders[2][XCT_MAX_PATH_BYTES], path[XCT_MAX_PATH_BYTES];
    int count = find_folders(folders, directory, false);
    for (int i = 0; i < count; i++) {
        struct xct_error ignored;
        struct xct_file file;
        if (!file_name(path, folders[i], key) || xct_file_map(&file, path, &ignored) != XCT_OK)
            continue;
        void *program = program_in(&file, key, size);
        xct_file_unmap(&file);
        if (program != NULL)
            return program;
    }
    return NULL;
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

void xct_cache_write(const char *directory, const uint8_t key[32], const void *program, size_t size)
{
    char folders[2][XCT_MAX_PATH_BYTES], path[XCT_MAX_PATH_BYTES];
    struct cache_header header = {.program_bytes = size};
    if (size == 0 || size > MAX_PROGRAM_BYTES)
        return;
    uint8_t *data = malloc(sizeof header + size);
    if (data == NULL)
        return;
    memcpy(header.magic, magic, sizeof magic);
    memcpy(header.key, key, sizeof header.key);
    xct_sha256(program, size, header.program_sha256);
    memcpy(data, &header, sizeof header);
    memcpy(data + sizeof header, program, size);
    int count = find_folders(folders, directory, true);
    bool written = false;
    for (int i = 0; i < count && !written; i++) {
        struct xct_error ignored;
        make_folder(folders[i]);
        written = file_name(path, folders[i], key)
                  && xct_file_write(path, data, sizeof header + size, &ignored) == XCT_OK;
    }
    free(data);
}
