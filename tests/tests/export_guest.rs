//! A kernel's own NBD client on our exports, in a small virtual machine and over TCP: it makes filesystems, mounts them, lets fio verify
//! what it wrote, over two connections each. The filesystem is then in the plaintext on the host. qemu-nbd serves one as well, so that it
//! is known to be right. Where no such machine can be started, the test is skipped loudly.

use std::net::{TcpListener, TcpStream};
use std::process::Command;

use tests::guest::{guest, run, says};
use tests::luks::{Shape, empty, have, secret};
use tests::{Place, Running, User, eventually};

const MIB: usize = 1 << 20;

/// A port that nobody has; whoever asks next may get another one.
fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address").port()
}

/// Where the guest finds this machine.
const HOST: &str = "10.0.2.2";

const SCRIPT: &str = r#"
modprobe nbd nbds_max=8; modprobe ext4
ip link set eth0 up; ip addr add 10.0.2.15/24 dev eth0
use() { port=$1 disk=$2
nbd-client HOST $port $disk -C 2 -b $3 >/dev/null 2>&1 || { echo "no client for $disk"; return; }
mkfs.ext4 -q -F -b 4096 $disk && mount -t ext4 -o discard $disk /mnt || { echo "no filesystem on $disk"; return; }
echo "written through $port" > /mnt/greeting
fio --name=load --filename=/mnt/load --rw=randrw --bsrange=4k-64k --size=12m --direct=1 --ioengine=libaio --iodepth=8 \
    --verify=crc32c --verify_fatal=1 --fsync=64 --minimal >/dev/null && echo "verified $port"
cp /mnt/load /mnt/copy && rm /mnt/load && sync && fstrim /mnt
echo "sum $port $(sha256sum < /mnt/copy | cut -d' ' -f1)"
umount /mnt; echo 3 > /proc/sys/vm/drop_caches; e2fsck -fn $disk >/dev/null 2>&1 && echo "clean $port"
nbd-client -d $disk >/dev/null 2>&1; }
"#;

#[test]
fn a_kernel_keeps_filesystems_on_exports() {
    let Some(guest) = guest() else { return };
    if !have(&["qemu-nbd", "e2fsck", "debugfs"]) {
        return;
    }
    let place = Place::new(User::Me);
    secret(&place, "pass", b"correct horse battery staple");
    empty(&place, "plain", 64 * MIB);
    let luks = |shape: Shape| (format!("{} --key file:@/pass", shape.ours()), "--key file:@/pass".to_owned());
    let raw = |unit: u32| (format!("RAW --sector-size {unit}"), format!("RAW --sector-size {unit}"));
    // The first one is not ours.
    let volumes =
        [None, Some(luks(Shape::luks2(4096, 512, "pbkdf2"))), Some(luks(Shape::luks1(512))), Some(raw(512))];
    let mut servers: Vec<(u16, Running)> = Vec::new();
    let mut script = SCRIPT.replace("HOST", HOST);
    for (n, volume) in volumes.iter().enumerate() {
        let port = free_port();
        let running = match volume {
            None => {
                std::fs::copy(place.path("plain"), place.path("volume0")).expect("copied");
                let words = format!(
                    "exec qemu-nbd --bind=127.0.0.1 --port={port} --format=raw --shared=0 --persistent --discard=unmap @/volume0"
                );
                place.launch(place.script(&words))
            }
            Some((making, opening)) => {
                let _ = place.run(&format!("encrypt @/plain @/volume{n} {making}")).done();
                place.spawn(&format!("export @/volume{n} --nbd tcp:127.0.0.1:{port} --insecure {opening}"))
            }
        };
        servers.push((port, running));
        script.push_str(&format!("use {port} /dev/nbd{n} {}\n", if n == 3 { 512 } else { 4096 }));
    }
    for (port, running) in &mut servers {
        eventually("a server listens", || {
            assert!(running.is_running(), "ended: {}", running.said());
            TcpStream::connect(("127.0.0.1", *port)).is_ok()
        });
    }
    let mut command = Command::new(guest);
    command.args(["-M", "virtio_net", "-p", "nbd-client", "-p", "fio", "-p", "e2fsprogs"]);
    command.args(["-q", "-netdev user,id=net -device virtio-net-pci,netdev=net"]);
    let Some(text) = run(&place, command, &script) else { return };
    for (n, (volume, (port, running))) in volumes.iter().zip(servers).enumerate() {
        says(&text, &format!("verified {port}"), &format!("{volume:?}"));
        says(&text, &format!("clean {port}"), &format!("{volume:?}"));
        running.signal(if n == 0 { rustix::process::Signal::TERM } else { rustix::process::Signal::INT });
        let _ = running.wait();
        match volume {
            None => std::fs::copy(place.path("volume0"), place.path("back")).map(drop).expect("copied"),
            Some((_, opening)) => {
                let _ = place.run(&format!("decrypt @/volume{n} @/back --force {opening}")).done();
            }
        }
        let _ = place.shell("e2fsck -fn @/back").done();
        let greeting = place.shell("debugfs -R 'cat /greeting' @/back").done().text();
        assert_eq!(greeting, format!("written through {port}\n"), "{volume:?}");
        let _ = place.shell("rm -f @/load && debugfs -R 'dump /copy @/load' @/back").done();
        let sum = place.shell("sha256sum < @/load").done().text();
        let sum = sum.split_whitespace().next().expect("a sum");
        says(&text, &format!("sum {port} {sum}"), &format!("{volume:?}"));
    }
}
