//! The long help: what each verb does and refuses, examples, exit statuses. Man pages are made of it.

/// Shown by `cryptctl --help`.
pub const TOP: &str = "\
Encrypts, decrypts, verifies and re-encrypts volumes at the speed of the device, and serves their plaintext to NBD clients.

cryptctl opens files, devices and keys with your rights and hands them to cryptd, which moves the data. If no daemon \
answers, one is started for you; it leaves when it has been idle for a while. No root is needed: who may open a \
file may encrypt it. The encrypted side is byte for byte what cryptsetup and the kernel read: LUKS2, LUKS1, or dm-crypt \
plain.";

/// The end of `cryptctl --help`.
pub const TOP_AFTER: &str = "\
ENDS
  SRC and DST are files, block devices, named pipes, NBD URIs or `-` (standard
  input or output). A new or replaced file is written as DST.partial beside its final
  place and takes its name only when it is whole and durable. A job that
  fails or is cancelled removes it, unless it is resumable: then it leaves
  DST.partial.checkpoint beside it. An existing file that is not empty is
  refused without --force, and so is a block device that holds a filesystem,
  a LUKS volume or a partition table. Block devices are opened exclusively:
  one that is mounted is always refused.

NBD
  A volume that an NBD server has is named by its URI wherever a file or block
  device can be: as SRC, DST, VOLUME or --header.
    nbd://HOST[:PORT]/NAME             TCP, port 10809
    nbd+unix:///NAME?socket=PATH       a Unix socket
    nbds://…  nbds+unix://…            with TLS, or not at all
  NAME is the server's export; none is its default. With TLS the server must
  show a certificate that the system trusts, or one that is trusted by
  DIR/ca-cert.pem with `?tls-certificates=DIR`, where client-cert.pem and
  client-key.pem may lie as well; `&tls-hostname=NAME` is whose it must be.
  cryptctl connects, with your rights; cryptd speaks the protocol, over several
  connections where the server allows that. To be overwritten without --force
  the first and the last MiB must be zeros. Nobody keeps others from using the
  volume meanwhile: NBD has no locks, and cryptsetup's do not reach a server. A
  server is asked twice by some verbs, so qemu-nbd needs --persistent.

SIZES
  64k, 1M, 1MiB, 1.5G are powers of 1024; 1MB is a power of 1000.

EXIT STATUS
  0    done
  1    what was asked failed, was cancelled or was refused; a header is
       damaged; or what there is to say could not be written
  2    usage: the command line, something this version cannot do, or no
       LUKS header where there should be one
  3    no daemon could be reached, or it went away
  4    wrong key or damaged data
  5    verification found a difference
  130  left at once: on a second interrupt, at the key prompt, or from
       `job watch`, whose job goes on

  The first interrupt (Ctrl-C, SIGTERM, SIGHUP) of encrypt, decrypt, verify
  and bench cancels the job, waits until it is undone, and ends with status 1.
  So does, with --json, a reader of the events that goes away. A re-encryption
  is not undone but stopped between two steps, and can be gone on with; an
  export is drained, and ends with status 0. What an interrupt does to a change
  of a header, `cryptctl luks --help` tells.

FILES
  $XDG_RUNTIME_DIR/cryptd/cryptd.sock
         where this user's daemon listens; without XDG_RUNTIME_DIR, or if it
         is another user's (su, sudo -E), it is /tmp/cryptd-UID/cryptd.sock
  SOCKET.log beside the socket, such as cryptd.sock.log
         what a daemon started by cryptctl has to say

ENVIRONMENT
  NO_COLOR   no colour, even on a terminal

EXAMPLES
  head -c 64 /dev/urandom > vol.key && chmod 600 vol.key
  cryptctl encrypt disk.img vol.luks --key file:vol.key
  cryptctl verify  disk.img vol.luks --key file:vol.key
  cryptctl luks add-key vol.luks --key file:vol.key --new-key prompt
  cryptctl decrypt vol.luks - --key prompt | zstd > img.zst";

/// `encrypt --help`.
pub const ENCRYPT: &str = "\
Encrypts SRC to DST: a new LUKS2 volume, unless --format names another.

A LUKS volume begins with its header, usually of 16 MiB, so DST is larger than SRC by that; with --header it has a file of \
its own. The volume key is random. Deriving a key from the passphrase takes about two seconds (--iter-time) at first.

The plaintext must be a whole number of data units (--sector-size), or be filled up with --pad. Holes of a source file \
are read as zeros without touching the disk, and encrypted: the sink has no holes. Runs in the foreground with \
progress on standard error; Ctrl-C cancels and undoes.

What stands in a device beyond the end of the plaintext is left as it is.

With --resumable a copy that was interrupted, by Ctrl-C, a full disk, a killed daemon or a power cut, goes on where it was: \
the same command with --resume. A daemon that has gone does not know its jobs any more, and one that is there has given \
back what it was handed, so a copy is resumed by its command and not by `job resume`.";

/// The end of `encrypt --help`.
pub const ENCRYPT_AFTER: &str = "\
EXAMPLES
  A disk image to a volume that cryptsetup opens, and back:
    cryptctl encrypt disk.img vol.luks --key prompt --label backup
    cryptctl decrypt vol.luks disk.img --key prompt

  From a pipe to a device, and to a pipe:
    pg_basebackup -D - -Ft |
      cryptctl encrypt - /dev/vdb --key keyring:backup --pad
    tar -c /srv | cryptctl encrypt - - --key fd:3 --pad 3< vol.key | ssh …

  With the header in a file of its own:
    cryptctl encrypt disk.img /dev/vdb --key file:vdb.key --header vdb.header
    cryptctl verify  disk.img /dev/vdb --key file:vdb.key --header vdb.header

  For a small machine that has 64 MiB to unlock it with:
    cryptctl encrypt disk.img vol.luks --key prompt --pbkdf-memory 65536 \\
      --iter-time 4000

  LUKS1 for QEMU or GRUB, and raw as dm-crypt plain has it:
    cryptctl encrypt disk.img vol.luks --format luks1 --key file:vol.key
    cryptctl encrypt disk.img disk.enc --format raw --key file:raw.key \\
      --sector-size 4096 --iv-large-sectors

  A copy of hours that a power cut does not send back to its beginning:
    cryptctl encrypt disk.img vol.luks --key file:vol.key --resumable
    cryptctl encrypt disk.img vol.luks --key file:vol.key --resume

  The same to a device, which needs a place for the checkpoint:
    cryptctl encrypt disk.img /dev/vdb --key file:vol.key \\
      --checkpoint vdb.checkpoint

  The disk of a virtual machine, and later what has changed since:
    qemu-nbd -r -t -x disk -k /run/vm.sock -f qcow2 -B since disk.qcow2 &
    cryptctl encrypt 'nbd+unix:///disk?socket=/run/vm.sock' vol.luks \\
      --key file:vol.key
    cryptctl encrypt 'nbd+unix:///disk?socket=/run/vm.sock' vol.luks \\
      --key file:vol.key --bitmap qemu:dirty-bitmap:since --update

  With a key that never touches the disk, at no more than 200 MiB/s:
    fetch-key | cryptctl encrypt disk.img vol.luks --key fd:0 --throttle 200M

EXIT STATUS
  0 done, 1 failed, cancelled or refused, 2 usage, 3 daemon unreachable";

/// `decrypt --help`.
pub const DECRYPT: &str = "\
Decrypts SRC to DST.

SRC is a LUKS volume of either version, whatever program made it; all that is needed beside the key is in its header. A \
raw volume has none: --format raw, and the parameters it was encrypted with.

Zero plaintext becomes holes where the sink can have them (see --no-sparse). A hole in the encrypted file is \
ciphertext like any other zeros and decrypts to noise, unless --keep-holes promises that it was never written. \
The raw format carries no check of the key: a wrong key gives noise, so verify what you have decrypted. \
A new DST file is readable by you alone.

With --resumable a copy that was interrupted goes on where it was: the same command with --resume.";

/// The end of `decrypt --help`.
pub const DECRYPT_AFTER: &str = "\
EXAMPLES
  To a file, and through a pipe:
    cryptctl decrypt vol.luks disk.img --key file:vol.key
    cryptctl decrypt /dev/vdb - --key prompt | tar -x
    ssh host cat vol.luks | cryptctl decrypt - disk.img --key file:vol.key

  With a header backup, made when all was well, where the volume's own
  header is damaged now:
    cryptctl decrypt vol.luks disk.img --header vol.header --key prompt

  Raw, with the parameters it was encrypted with:
    cryptctl decrypt disk.enc disk.img --format raw --key file:raw.key \\
      --sector-size 4096 --iv-large-sectors

EXIT STATUS
  0 done, 1 failed, damaged header, cancelled or refused,
  2 usage or no LUKS header, 3 daemon unreachable,
  4 wrong key or damaged data";

/// `verify --help`.
pub const VERIFY: &str = "\
Compares plaintext SRC with the decrypted DST, and writes nothing.

The first differing byte offset of the plaintext is told, and the exit status is 5. Use --pad if DST was encrypted with \
it, and for a raw volume the parameters it was encrypted with.";

/// The end of `verify --help`.
pub const VERIFY_AFTER: &str = "\
EXAMPLES
  cryptctl verify disk.img vol.luks --key file:vol.key
  cryptctl verify disk.img /dev/vdb --key prompt --json
  cryptctl verify disk.img disk.enc --format raw --key file:raw.key

EXIT STATUS
  0 equal, 1 failed, cancelled or damaged header,
  2 usage or no LUKS header, 3 daemon unreachable,
  4 wrong key or damaged data, 5 they differ";

/// `job --help`.
pub const JOB: &str = "\
Lists, watches and steers jobs.

You see your own jobs, root sees all. A job started with --detach outlives the command that started it.

`resume` goes on with a job that was paused. A copy that failed, was cancelled, or whose daemon was killed is no job any \
more: what it read and wrote was handed back. If it was begun with --resumable, its own command with --resume goes on.

A re-encryption is paused and cancelled between two steps, where it is durable; a cancelled one is not undone, and \
`cryptctl reencrypt --resume-only` goes on with it.";

/// The end of `job --help`.
pub const JOB_AFTER: &str = "\
EXAMPLES
  id=$(cryptctl encrypt disk.img vol.luks --key file:vol.key --detach)
  cryptctl job throttle \"$id\" 100M
  cryptctl job watch \"$id\"

EXIT STATUS
  0 done, 1 no such job or not possible now, 2 usage, 3 daemon unreachable;
  `watch` ends with the status the job would have had in the foreground, or
  130 when it is interrupted: the job goes on";

/// `stats --help`.
pub const STATS: &str = "\
Shows where the time of chunks goes, stage by stage: read, queue, crypt, write, flush.

Each row counts the chunks that passed the stage, its share of all chunk time, and the latency per chunk at the median \
and beyond. The stage with the largest share is the bottleneck.";

/// The end of `stats --help`.
pub const STATS_AFTER: &str = "\
EXAMPLES
  cryptctl stats
  cryptctl stats 3 --json

EXIT STATUS
  0 done, 1 no such job, 2 usage, 3 daemon unreachable";

/// `bench --help`.
pub const BENCH: &str = "\
Measures on this machine, in interleaved rounds: the pipeline with all its workers, from one file in memory to another \
(two files of 256 MiB, smaller where memory is short), and each kernel on one core, in place.

Beside each median stands the limit, measured in the same run, and the ratio of the two. For a kernel it is what the \
processor's AES instruction could do at best; for the pipeline, the same copy without encryption by plain reads and \
writes, on as many threads as there are workers. Jobs that run meanwhile go on, and lower the rates.";

/// The end of `bench --help`.
pub const BENCH_AFTER: &str = "\
EXAMPLES
  cryptctl bench
  cryptctl bench --kernel aes-ni --buffer 64k --rounds 9

EXIT STATUS
  0 done, 1 failed, 2 usage, 3 daemon unreachable";

/// `daemon --help`.
pub const DAEMON: &str = "\
Starts, stops or describes the daemon.

Starting is rarely needed: encrypt, decrypt, verify, reencrypt, export, bench and luks start a daemon when none answers, unless \
--no-start. One that is stopped drains its exports, and leaves when its jobs are done.";

/// The end of `daemon --help`.
pub const DAEMON_AFTER: &str = "\
EXAMPLES
  cryptctl daemon start --idle-exit 0
  cryptctl daemon status
  cryptctl daemon stop --now

EXIT STATUS
  0 done, 1 refused, 2 usage, 3 daemon unreachable";

/// The end of `completions --help`.
pub const COMPLETIONS_AFTER: &str = "\
EXAMPLES
  cryptctl completions bash \\
    > ~/.local/share/bash-completion/completions/cryptctl
  cryptctl completions zsh > ~/.zfunc/_cryptctl";

/// The end of `man --help`.
pub const MAN_AFTER: &str = "\
EXAMPLES
  mkdir -p ~/.local/share/man/man1
  cryptctl man ~/.local/share/man/man1
  man cryptctl-encrypt";
