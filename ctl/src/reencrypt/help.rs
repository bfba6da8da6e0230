//! The long help of `reencrypt`. The man page is made of it.

/// `reencrypt --help`
pub const REENCRYPT: &str = "\
Gives a volume another volume key, in place: reads every sector under the old key and writes it under the new one.

Changing a passphrase does not take the volume key from whoever had it once; this does. The new volume key is random. \
The keyslots whose passphrases are given with --key are made anew for it, with the same passphrases, and derive their keys as before unless options tell otherwise; the others are named, \
and nothing is done unless --drop-slots lets them go. In the end no keyslot, digest or segment of the header is bound to the old \
volume key, and the report says so.

With --encrypt plain data becomes a LUKS2 volume in place, and with --decrypt a volume with a detached header becomes plain \
data. LUKS1 becomes LUKS2 first, where its header leaves room for that.

The progress is in the volume's own header, as cryptsetup writes it: after a crash, a power cut, a kill or Ctrl-C the same \
command goes on where it was, on this machine or another, and so does `cryptsetup reencrypt --resume-only`. What cryptsetup has \
begun, this goes on with. A raw volume has no header: --journal keeps its progress in a file.

VOLUME may be what an NBD server has (see `cryptctl --help`); of its data nothing is looked at before, so where that matters a flag \
is asked for. Nobody else may use the volume meanwhile: one that is mounted or mapped is refused, and of a server nobody can tell. A volume \
in use is re-encrypted by cryptsetup; but one that the same daemon exports, a file or a block device with a LUKS header, is \
re-encrypted while its clients go on (--background-share). \
Make a header backup before, and a new one after: the old one holds the old key, and must never be restored once this has begun.";

/// The end of `reencrypt --help`
pub const REENCRYPT_AFTER: &str = "\
RESILIENCE
  A volume is rewritten step by step (--hotzone-size). While a step is being
  written, some of its sectors are old and some are new; what is kept of the
  old ones decides what a crash at that moment costs:

  checksum   A hash of every old block, in the header's free area. Survives a
             crash, a kill and a power cut at any instant, if the device writes
             each of its blocks whole or not at all, as disks do. The default,
             unless a block of the device is smaller than a data unit.
  journal    The old bytes themselves. Survives the same, and half-written
             blocks too. Everything is written twice; steps are as small as
             the header's free area. The default where the device may leave a
             data unit half written.
  datashift  Nothing, and nothing is needed: with --encrypt and
             --reduce-device-size data moves into space that is free, and its
             old place is whole until the header says that it has moved.
  none       Nothing. Survives being stopped (Ctrl-C, `job cancel`), which ends
             between two steps. A crash or a power cut destroys the step, so
             --crash-may-destroy-data must be given. Not for data you have no
             copy of.

  None of them replaces a backup: a disk that fails meanwhile takes the data
  with it, and so does a lost header.

INTERRUPTED
  Ctrl-C, SIGTERM and `job cancel` stop at the next safe point, say how far it
  is, and end with status 1; a second Ctrl-C leaves at once, and the job stops
  all the same. `job pause` stops there too and keeps the job. To go on, give
  the same command again, or
    cryptctl reencrypt VOLUME --resume-only --key REF
  with the passphrases it was begun with; with --new-key it needs the old one
  and the new one, since both keys are needed; and with --encrypt or --decrypt
  if that was begun. An interrupted step is recovered first. How far a volume
  is, without any key:
    cryptctl luks doctor VOLUME

CRYPTSETUP
  cryptsetup 2.4.3 or newer goes on with what was begun here, and repairs it
  (`cryptsetup repair`), with a passphrase that was kept: it takes only one,
  which must open both keys, so not with --new-key alone. What it has begun is
  gone on with here, except re-encryptions of before 2.4.3, whose metadata is
  not protected. Its lock
  (/run/cryptsetup/LN_LUKS2-reencryption-UUID, for root) is held as long as the
  job runs. Files are locked by the daemon.

THE REPORT
  In the end, on standard output: what was before and what is now, which
  keyslots were kept and dropped, whether a step was recovered, and a keyed
  digest of the plaintext as it was read under the old key. With --verify
  everything is read once more under the new key, and must have the same
  digest; if not, the exit status is 5. With --json the report is `reencrypt`
  in the `outcome` of the last event; `cryptctl job show` has it, too.

EXAMPLES
  Another volume key, same passphrase; first what it would do:
    cryptctl reencrypt /dev/vdb --key prompt --dry-run
    cryptctl luks header-backup /dev/vdb vdb.before
    cryptctl reencrypt /dev/vdb --key prompt --verify

  Two keyslots are kept, the passphrase of the first is replaced, all others
  go:
    cryptctl reencrypt vol.luks --key file:old.key --key keyring:spare \\
      --new-key file:new.key --drop-slots

  At night, at no more than 200 MiB/s, and the rest the next night:
    id=$(cryptctl reencrypt /dev/vdb --key file:vdb.key --detach \\
      --throttle 200M)
    cryptctl job watch \"$id\"; cryptctl job cancel \"$id\"
    cryptctl reencrypt /dev/vdb --key file:vdb.key --resume-only

  Plain data becomes a volume; the filesystem was shrunk by 32 MiB before:
    cryptctl reencrypt /dev/vdb --encrypt --new-key prompt \\
      --reduce-device-size 32M
  or with the header in a file, and back:
    cryptctl reencrypt /dev/vdb --encrypt --header vdb.header --new-key prompt
    cryptctl reencrypt /dev/vdb --decrypt --header vdb.header --key prompt

  A raw volume; the journal is needed until all is done:
    cryptctl reencrypt disk.enc --format raw --key file:old.key \\
      --new-key file:new.key --journal disk.journal

EXIT STATUS
  0 done, 1 failed, stopped, in use, refused or damaged header,
  2 usage or no LUKS header, 3 daemon unreachable,
  4 wrong key or damaged data, 5 --verify found a difference,
  130 left at once. Whatever it is, what was begun can be gone on with,
  except after a crash with --resilience none";
