//! The long help of the `export` verbs. Man pages are made of it.

/// `export --help`
pub const EXPORT: &str = "\
Serves the plaintext of VOLUME to NBD clients, while it stays encrypted on disk.

Databases, virtual machines and copying tools read and write the volume through a socket, without root and without \
device-mapper: nbdcopy, QEMU, the kernel's nbd-client. It runs in the foreground: the URI to connect to is printed when clients \
can. Ctrl-C lets clients have what they have asked for and ends with status 0, a second Ctrl-C drops them. With --detach the \
number of the export is printed instead, and it goes on until `export stop`, or until the daemon is stopped.

What a client has written is durable when its FLUSH, or a write with FUA, has been answered, and when the export has ended well. \
Writes to one place from several clients never mix within a data unit.

VOLUME is LUKS of either version, or raw as for `decrypt`. It is served once for writing, or any number of times with --read-only; \
jobs of the same daemon do not write it meanwhile, and other programs that lock images (QEMU, another cryptd) are respected.";

/// The end of `export --help`
pub const EXPORT_AFTER: &str = "\
ACCESS
  A Unix socket lets in you and root, and with --allow-uid the users that are
  named; the kernel says who connects. With --any-user it is the socket's mode
  alone that decides. Over TCP, clients need a certificate that one of the
  authorities of --tls-clients has signed, and all traffic is encrypted; who
  has one may use every export of that socket. Without TLS only loopback
  addresses are served, with --insecure, for every user of this machine.

  What goes through the socket is plaintext. Who may connect may do with the
  data what the export allows; the key of the volume stays in the daemon.

DISCARD
  By default TRIM changes nothing, and zeros that clients want written are
  encrypted as all data is: nobody who sees the volume learns which places
  are in use. With --discard such places are given back to the filesystem or
  device, which is what keeps a sparse image small. Then they read as noise
  or as zeros, and whoever sees the volume sees how full it is, and where.

SEVERAL EXPORTS ON ONE SOCKET
  Where an export of yours listens already, the next one joins it under
  another --name. The socket goes when its last export has ended.

EXAMPLES
  A file system in an encrypted file, copied in and out:
    cryptctl export vol.luks --nbd unix:vol.sock --key prompt --detach
    nbdcopy disk.img 'nbd+unix:///?socket=vol.sock'
    cryptctl export stop 1

  A virtual machine that runs as another user:
    cryptctl export vm.luks --nbd unix:/run/vm/disk --key file:vm.key \\
      --allow-uid 107 --detach
    qemu-system-x86_64 … -drive file=nbd:unix:/run/vm/disk,format=raw

  Two volumes on one socket, one of them for reading only:
    cryptctl export db.luks --nbd unix:db.sock --name data --key fd:3 \\
      --detach 3< db.key
    cryptctl export old.luks --nbd unix:db.sock --name old --read-only \\
      --key fd:3 --detach 3< old.key
    nbdinfo --list 'nbd+unix:///?socket=db.sock'

  To another machine:
    cryptctl export vol.luks --nbd tcp:storage1:10809 --key prompt \\
      --tls-cert server.pem --tls-key server.key --tls-clients ca.pem

EXIT STATUS
  0 ended as asked, 1 failed or refused, 2 usage or no LUKS header,
  3 daemon unreachable, or it went away,
  4 wrong key or damaged data, 130 left at once on a third interrupt";

/// `export list --help`
pub const LIST: &str = "\
Lists your exports, root all; those that have ended while they are remembered, with why.

READ and WRITTEN count bytes of plaintext that clients asked for. An export without a name (-) is the default one of its socket.";

/// The end of `export list --help`
pub const LIST_AFTER: &str = "\
EXAMPLES
  cryptctl export list
  cryptctl export list --json | jq '.ok.exports[] | {export, address}'

EXIT STATUS
  0 done, 2 usage, 3 daemon unreachable";

/// `export stop --help`
pub const STOP: &str = "\
Ends an export, and returns when it has ended.

No new clients are let in; those there are get what they have asked for and are closed, or dropped if they do not take it \
within 15 seconds. Then all that was written is made durable. With --now nobody is waited for: a client learns of requests that were \
not answered by its connection, and knows of nothing that was not flushed.";

/// The end of `export stop --help`
pub const STOP_AFTER: &str = "\
EXAMPLES
  cryptctl export stop 3
  cryptctl export stop 3 --now

EXIT STATUS
  0 ended, and durable; 1 no such export, it was over already, or making it
  durable failed; 2 usage, 3 daemon unreachable";

/// `export stats --help`
pub const STATS: &str = "\
Shows what was asked of an export, by command, and where the time of requests goes, stage by stage.

Stages are those of `cryptctl stats`: read and write on the device, crypt on a core, queue for what waited, flush. System calls are \
those of the workers, jobs' included.";

/// The end of `export stats --help`
pub const STATS_AFTER: &str = "\
EXAMPLES
  cryptctl export stats 3
  cryptctl export stats 3 --json

EXIT STATUS
  0 done, 1 no such export, 2 usage, 3 daemon unreachable";
