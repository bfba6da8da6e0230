//! The long help of the `luks` verbs. Man pages are made of it.

/// `luks --help`
pub const LUKS: &str = "\
Makes, shows and changes the headers of LUKS volumes.

VOLUME is a file, a block device or an NBD URI (see `cryptctl --help`); with --header its header is in a file of its own. No root is needed for what you may \
open, and no device-mapper: a volume may be mapped meanwhile, except while it is made anew. What is written is what \
cryptsetup and the kernel read, and each change is durable when the command ends: one that fails has changed nothing that \
opens the volume.

The data itself is encrypted, decrypted and compared by `cryptctl encrypt`, `decrypt` and `verify`.";

/// The end of `luks --help`
pub const LUKS_AFTER: &str = "\
KEYS
  A key REF names a passphrase: every byte of a file:, fd: or keyring:, a
  newline at its end too, as with `cryptsetup --key-file`; at most 8 MiB. A
  new passphrase that ends in a newline is warned about. The line typed at a
  prompt ends before the newline. --volume-key names the volume key itself:
  raw bytes, or hexadecimal digits. A key longer than a pipe may hold
  (/proc/sys/fs/pipe-max-size) goes through memory that may be swapped out.

LOCKS
  While a header is read or changed, cryptsetup's lock is held: of a block
  device /run/cryptsetup/L_MAJOR:MINOR, for which one must be root; of a file,
  a lock on the file. Another program that has it is waited for, up to ten
  seconds.

INTERRUPTS
  Ctrl-C leaves with status 1. Nothing is changed then, unless writing had
  begun: what has begun is completed.

EXIT STATUS
  0 done, 1 failed, a damaged header, or `doctor` found a danger,
  2 usage or no LUKS header, 3 daemon unreachable,
  4 wrong key or damaged data: which of the two, nobody can tell

EXAMPLES
  Make a volume, give it a second passphrase, and keep a copy of its header:
    cryptctl luks format vol.luks --key prompt
    cryptctl luks add-key vol.luks --key prompt --new-key file:spare.key
    cryptctl luks header-backup vol.luks vol.header

  Replace a passphrase that leaked, and see that the old one is gone:
    cryptctl luks change-key vol.luks --key file:old.key --new-key prompt
    cryptctl luks open-test vol.luks --key file:old.key; test $? -eq 4";

/// `luks format --help`
pub const FORMAT: &str = "\
Makes a new LUKS header with one keyslot on an existing file or block device, or on what an NBD server has.

Only the header is written. What stood in the data area before is not overwritten: read through the new volume it is \
noise, and to whoever has the device it is still what it was. `cryptctl encrypt` makes header and data in one go.

Everything up to where the data begins is overwritten. Unless that, and the first 16 MiB, is zeros, VOLUME is refused without --force; so is a \
device with a known signature anywhere, and an existing header file. A device in use always is. Of a file nobody knows who \
uses it: a job that reads it, or a mapping through a loop device, does not keep it from being formatted, nor from `erase`.";

/// The end of `luks format --help`
pub const FORMAT_AFTER: &str = "\
EXAMPLES
  A volume in a file, made here and mapped by cryptsetup:
    truncate -s 1G vol.luks && cryptctl luks format vol.luks --key prompt
    sudo cryptsetup open vol.luks vol

  A header in a file of its own, so that the device holds nothing but data:
    cryptctl luks format /dev/vdb --header vdb.header --key file:vdb.key
    sudo cryptsetup open /dev/vdb vol --header vdb.header --key-file vdb.key

  LUKS1, for programs that know no other:
    cryptctl luks format vol.luks --format luks1 --key file:vol.key \\
      --iter-time 5000

EXIT STATUS
  0 done, 1 failed or refused, 2 usage, 3 daemon unreachable";

/// `luks dump --help`
pub const DUMP: &str = "\
Shows the header: its copies, data areas, keyslots, tokens and digests. No key is needed, and none is shown.

Offsets and areas are in bytes, tweaks in 512-byte sectors. With --json the answer holds the same as `summary`, and \
beside it the header's own fields as `metadata`: for LUKS2 the JSON as it is on disk.";

/// The end of `luks dump --help`
pub const DUMP_AFTER: &str = "\
EXAMPLES
  cryptctl luks dump vol.luks
  cryptctl luks dump vol.luks --json | jq .ok.luks.dump.metadata.keyslots
  cryptctl luks dump vol.header

EXIT STATUS
  0 done, 1 failed or damaged, 2 usage or no LUKS header,
  3 daemon unreachable";

/// `luks open-test --help`
pub const OPEN_TEST: &str = "\
Tells whether a key opens the volume, and prints the keyslot that it opens, or `volume key`.

Nothing is mapped and nothing is written. With --quiet only the exit status tells.";

/// The end of `luks open-test --help`
pub const OPEN_TEST_AFTER: &str = "\
EXAMPLES
  cryptctl luks open-test vol.luks --key prompt
  fetch-key | cryptctl luks open-test vol.luks --key fd:0 --key-slot 2 -q &&
    echo 'keyslot 2 is up to date'

EXIT STATUS
  0 it opens, 1 failed or damaged, 2 usage or no LUKS header,
  3 daemon unreachable, 4 wrong key or damaged data";

/// `luks add-key --help`
pub const ADD_KEY: &str = "\
Adds a passphrase in a free keyslot. One that opens the volume is needed, or the volume key.

The volume key stays what it is: whoever had a passphrase once may have kept the volume key, and removing the \
passphrase does not take that away.

A new passphrase that is the one given with --key is warned about. Whether it opens yet another keyslot is not looked for, \
which would take as long as unlocking each; `open-test` does.";

/// The end of `luks add-key --help`
pub const ADD_KEY_AFTER: &str = "\
EXAMPLES
  cryptctl luks add-key vol.luks --key prompt --new-key file:new.key
  cryptctl luks add-key vol.luks --volume-key file:vk --new-key prompt \\
    --new-key-slot 7 --pbkdf pbkdf2 --iter-time 5000

  A random key for a machine, in a keyslot whose derivation costs next to
  nothing because the key itself cannot be guessed:
    head -c 64 /dev/urandom > machine.key && chmod 600 machine.key
    cryptctl luks add-key vol.luks --key prompt --new-key file:machine.key \\
      --pbkdf pbkdf2 --pbkdf-force-iterations 1000

EXIT STATUS
  0 done, 1 failed, damaged or no keyslot free,
  2 usage or no LUKS header, 3 daemon unreachable,
  4 wrong key or damaged data";

/// `luks remove-key --help`
pub const REMOVE_KEY: &str = "\
Destroys a keyslot: overwrites its area, then takes it out of the header.

With --key, the keyslot which that passphrase opens. With --key-slot, that one: without any passphrase, or, when --key is \
given too, only if that opens another keyslot, so that one is known to remain. The last keyslot is refused \
unless --last-key-destroy-data.

Older header backups still hold the keyslot: destroy them too.";

/// The end of `luks remove-key --help`
pub const REMOVE_KEY_AFTER: &str = "\
EXAMPLES
  cryptctl luks remove-key vol.luks --key file:leaked.key
  cryptctl luks remove-key vol.luks --key-slot 3 --key prompt

EXIT STATUS
  0 done, 1 failed, damaged or refused, 2 usage or no LUKS header,
  3 daemon unreachable, 4 wrong key or damaged data";

/// `luks change-key --help`
pub const CHANGE_KEY: &str = "\
Replaces a passphrase: makes a new keyslot first, and destroys the old one when the new one is durable.

A power cut in between leaves both. Where every keyslot is in use, one must be removed before.";

/// The end of `luks change-key --help`
pub const CHANGE_KEY_AFTER: &str = "\
EXAMPLES
  cryptctl luks change-key vol.luks --key prompt --new-key prompt
  cryptctl luks change-key vol.luks --key keyring:old --new-key keyring:new \\
    --key-slot 1

EXIT STATUS
  0 done, 1 failed or damaged, 2 usage or no LUKS header,
  3 daemon unreachable, 4 wrong key or damaged data";

/// `luks convert-kdf --help`
pub const CONVERT_KDF: &str = "\
Keeps a passphrase, but derives its key in another way, or at another cost.

Without options: what a new keyslot would get here, argon2id that takes two seconds, or with LUKS1 pbkdf2, which is all \
that LUKS1 has. Worth it when a volume moves to a faster or a much smaller machine, or when a program knows only pbkdf2.

As with `change-key`, a new keyslot is made before the old one is destroyed, so one must be free. With LUKS2 it gets the old \
one's number; with LUKS1 its number is another.";

/// The end of `luks convert-kdf --help`
pub const CONVERT_KDF_AFTER: &str = "\
EXAMPLES
  cryptctl luks convert-kdf vol.luks --key prompt --pbkdf pbkdf2
  cryptctl luks convert-kdf vol.luks --key prompt --pbkdf-memory 65536

EXIT STATUS
  0 done, 1 failed or damaged, 2 usage or no LUKS header,
  3 daemon unreachable, 4 wrong key or damaged data";

/// `luks header-backup --help`
pub const HEADER_BACKUP: &str = "\
Copies header and keyslots to a new file, which cryptsetup reads as well.

Keep it safe and few: it opens the volume with every passphrase the volume has now, also with those that are removed \
later.";

/// The end of `luks header-backup --help`
pub const HEADER_BACKUP_AFTER: &str = "\
EXAMPLES
  cryptctl luks header-backup /dev/vdb vdb.header
  cryptctl decrypt /dev/vdb disk.img --header vdb.header --key prompt

EXIT STATUS
  0 done, 1 failed or damaged, 2 usage or no LUKS header,
  3 daemon unreachable";

/// `luks header-restore --help`
pub const HEADER_RESTORE: &str = "\
Puts header and keyslots back from a backup.

Refused if VOLUME holds the header of another volume, or none that can be read, unless --replace-other-header; and while \
the volume key of the volume is being changed. Keyslots made since the backup are lost, removed ones are back.";

/// The end of `luks header-restore --help`
pub const HEADER_RESTORE_AFTER: &str = "\
EXAMPLES
  cryptctl luks open-test vol.header --key prompt &&
    cryptctl luks header-restore vol.luks vol.header

EXIT STATUS
  0 done, 1 failed, damaged or refused, 2 usage or FILE is no header,
  3 daemon unreachable";

/// `luks erase --help`
pub const ERASE: &str = "\
Destroys every keyslot: the quick way to make a whole volume unreadable.

The data stays, encrypted with a volume key that nobody has any more, unless there is a header backup. Asks on the \
terminal first, naming volume and UUID, unless --yes-destroy-all-keys. A file that a job is reading meanwhile is not spared.";

/// The end of `luks erase --help`
pub const ERASE_AFTER: &str = "\
EXAMPLES
  cryptctl luks erase /dev/vdb
  cryptctl luks erase /dev/vdb --yes-destroy-all-keys

EXIT STATUS
  0 done, 1 failed, damaged or not confirmed,
  2 usage, no terminal to ask on, or no LUKS header,
  3 daemon unreachable";

/// `luks token --help`
pub const TOKEN: &str = "\
Adds, removes and lists tokens: notes in a LUKS2 header on how a keyslot is unlocked. They are readable to everybody who \
can read the volume, and hold no secrets.

A token of type cryptctl-key says where the passphrase of a keyslot is kept, and by which day it must be replaced. Any \
other is added as a JSON object, with its `type` and its `keyslots`.";

/// The end of `luks token --help`
pub const TOKEN_AFTER: &str = "\
EXAMPLES
  cryptctl luks token add vol.luks --key-ref barbican:2f1c --key-slot 0 \\
    --rotate-by 2027-03-31
  cryptctl luks token list vol.luks

  A key from the kernel's keyring, which `cryptsetup open` uses by itself:
    echo '{\"type\":\"luks2-keyring\",\"keyslots\":[\"0\"],
           \"key_description\":\"vol\"}' |
      cryptctl luks token add vol.luks --json-file -
    cryptctl luks token remove vol.luks --token-id 1

EXIT STATUS
  0 done, 1 failed, damaged or no such token,
  2 usage or no LUKS header, 3 daemon unreachable";

/// `luks repair --help`
pub const REPAIR: &str = "\
Repairs a header as far as that can be done without guessing.

LUKS2: a damaged or obsolete copy of the header is written anew from the good one. LUKS1: what is known to go wrong in \
its fields is corrected. With --dry-run it is only said what would be done. Damaged keyslots cannot be repaired, only \
restored from a backup that was made while they were whole. Keep a copy of the bytes before you repair anything; \
`header-backup` copies only headers that can be read.";

/// The end of `luks repair --help`
pub const REPAIR_AFTER: &str = "\
EXAMPLES
  cryptctl luks repair vol.luks --dry-run
  head -c 16M vol.luks > before.bytes && cryptctl luks repair vol.luks

EXIT STATUS
  0 done or nothing to do, 1 failed or beyond repair,
  2 usage or no LUKS header, 3 daemon unreachable";

/// `luks doctor --help`
pub const DOCTOR: &str = "\
Explains a volume: whether its header copies agree, which settings are weak, how long a passphrase takes to unlock on this \
machine, and which programs can open it.

Findings are of three kinds: DANGER is damage, or data that may be lost; weak works, but should be changed; note is good \
to know. With --key a passphrase is looked at, without opening anything: can other programs use it?";

/// The end of `luks doctor --help`
pub const DOCTOR_AFTER: &str = "\
EXAMPLES
  cryptctl luks doctor vol.luks
  for volume in /srv/volumes/*; do
    cryptctl luks doctor \"$volume\" > \"$volume.report\" || echo \"$volume\"
  done

EXIT STATUS
  0 no danger found, 1 danger found, damaged or failed,
  2 usage or no LUKS header, 3 daemon unreachable";
