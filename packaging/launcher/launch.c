/*
 * Stands where the distribution's xl was, and runs the xl that can load
 * plugins, or the distribution's.
 *
 * An xl, and the plugins that it loads, belong to the very libraries that
 * they were built against: libxl promises no more than its soname, and the
 * rest of Xen's versioned libraries not even that.  So after an update of
 * Xen, which must not wait for anybody's plugins, the libraries are others,
 * and the distribution's own xl, which came along with them, is the one to
 * run.  This is told by the libraries' build IDs.
 *
 * It is linked with nothing but libc, so that it starts whatever has become
 * of Xen's libraries.  What is built into it is in the header that `build'
 * writes.
 */

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "launch_built_for.h"

/* More than the linker has ever made of either. */
#define PROGRAM_HEADERS_MAX  64
#define NOTES_BYTES_MAX      4096
#define BUILD_ID_BYTES_MAX   64

static const struct library {
    const char *path;
    const char *build_id; /* in hex */
} libraries[] = { BUILT_FOR };

/* Whether all of it could be read. */
static bool read_at(int fd, void *to, size_t size, uint64_t offset)
{
    size_t done = 0;
    ssize_t r;

    if (offset > LONG_MAX)
        return false;
    while (done < size) {
        r = pread(fd, (char *)to + done, size - done, offset + done);
        if (r < 0 && errno == EINTR)
            continue;
        if (r <= 0)
            return false;
        done += r;
    }
    return true;
}

/* The build ID among the notes, in hex; empty if there is none. */
static void find_build_id(const unsigned char *notes, size_t size,
                          char id[2 * BUILD_ID_BYTES_MAX + 1])
{
    Elf64_Nhdr note;
    size_t name, desc, i;

    while (size >= sizeof(note)) {
        memcpy(&note, notes, sizeof(note));
        notes += sizeof(note);
        size -= sizeof(note);
        name = ((size_t)note.n_namesz + 3) & ~(size_t)3;
        if (name > size)
            return;
        desc = ((size_t)note.n_descsz + 3) & ~(size_t)3;
        if (desc > size - name)
            return;
        if (note.n_type == NT_GNU_BUILD_ID && note.n_namesz == 4 &&
            !memcmp(notes, "GNU", 4) &&
            note.n_descsz <= BUILD_ID_BYTES_MAX) {
            for (i = 0; i < note.n_descsz; i++)
                sprintf(id + 2 * i, "%02x", notes[name + i]);
            return;
        }
        notes += name + desc;
        size -= name + desc;
    }
}

static bool is_as_built(const struct library *lib)
{
    char id[2 * BUILD_ID_BYTES_MAX + 1] = "";
    unsigned char notes[NOTES_BYTES_MAX];
    Elf64_Ehdr header;
    Elf64_Phdr segment;
    int fd, i;

    fd = open(lib->path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    if (!read_at(fd, &header, sizeof(header), 0) ||
        memcmp(header.e_ident, ELFMAG, SELFMAG) ||
        header.e_ident[EI_CLASS] != ELFCLASS64 ||
        header.e_phentsize != sizeof(segment) ||
        header.e_phnum > PROGRAM_HEADERS_MAX ||
        header.e_phoff > LONG_MAX)
        goto out;
    for (i = 0; i < header.e_phnum && !*id; i++) {
        if (!read_at(fd, &segment, sizeof(segment),
                     header.e_phoff + i * sizeof(segment)))
            goto out;
        if (segment.p_type != PT_NOTE || segment.p_filesz > sizeof(notes))
            continue;
        if (!read_at(fd, notes, segment.p_filesz, segment.p_offset))
            goto out;
        find_build_id(notes, segment.p_filesz, id);
    }

 out:
    close(fd);
    return *id && !strcmp(id, lib->build_id);
}

int main(int argc, char **argv)
{
    size_t i;

    for (i = 0; i < sizeof(libraries) / sizeof(libraries[0]); i++) {
        if (!is_as_built(&libraries[i])) {
            fprintf(stderr, "xl: %s isn't the one that " PACKAGE
                    " was built for: this is the distribution's xl, without"
                    " plugins, until " PACKAGE " is upgraded too\n",
                    libraries[i].path);
            goto distribution;
        }
    }
    execv(XL_WITH_PLUGINS, argv);
    fprintf(stderr, "xl: cannot run " XL_WITH_PLUGINS ": %s: this is the"
            " distribution's xl, without plugins\n", strerror(errno));

 distribution:
    execv(XL_OF_DISTRIBUTION, argv);
    fprintf(stderr, "xl: cannot run " XL_OF_DISTRIBUTION ": %s\n",
            strerror(errno));
    return 127;
}

/*
 * Local variables:
 * mode: C
 * c-basic-offset: 4
 * indent-tabs-mode: nil
 * End:
 */
