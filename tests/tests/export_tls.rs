//! Exports over TLS: real clients (libnbd, which is GnuTLS) with certificates made here, right ones and wrong ones.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use engine::export::nbd::tls::server_config;
use engine::format::nbd::option::{
    GREETING_BYTES, OPTION_BYTES, REPLY_BYTES, answer, number, parse_reply, put_option,
};
use proto::ErrorKind;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustix::process::Signal;
use tests::luks::{have, secret};
use tests::{Place, Running, User};
use tests::{eventually, seed};

const MIB: usize = 1 << 20;

/// Somebody who signs certificates.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate().expect("a key");
        let pem = params.self_signed(&key).expect("signed").pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// A certificate and its key.
    fn sign(&self, names: &[&str], usage: ExtendedKeyUsagePurpose) -> (String, String) {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).expect("names");
        params.distinguished_name.push(DnType::CommonName, "somebody");
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("signed");
        (certificate.pem(), key.serialize_pem())
    }
}

/// A volume served over TLS, and directories of certificates as libnbd wants them.
struct Served {
    place: Place,
    plain: Vec<u8>,
    port: u16,
    running: Option<Running>,
}

impl Served {
    fn new(length: usize) -> Self {
        let place = Place::new(User::Me);
        let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
        let (certificate, key) = ours.sign(&["localhost", "127.0.0.1"], ExtendedKeyUsagePurpose::ServerAuth);
        place.write("server.pem", certificate.as_bytes());
        secret(&place, "server.key", key.as_bytes());
        place.write("clients.pem", ours.pem.as_bytes());
        for (name, trusts, signs) in [
            ("right", &ours, Some(&ours)),
            ("none", &ours, None),
            ("wrong", &ours, Some(&theirs)),
            ("strange", &theirs, Some(&ours)),
        ] {
            std::fs::create_dir(place.path(name)).expect("mkdir");
            place.write(&format!("{name}/ca-cert.pem"), trusts.pem.as_bytes());
            if let Some(signs) = signs {
                let (certificate, key) = signs.sign(&["client"], ExtendedKeyUsagePurpose::ClientAuth);
                place.write(&format!("{name}/client-cert.pem"), certificate.as_bytes());
                place.write(&format!("{name}/client-key.pem"), key.as_bytes());
            }
        }
        secret(&place, "pass", b"correct horse battery staple");
        let plain = place.noise("plain", length);
        let _ = place
            .run("encrypt @/plain @/volume --key file:@/pass --pbkdf pbkdf2 --pbkdf-force-iterations 1000")
            .done();
        let port = TcpListener::bind("127.0.0.1:0").expect("binds").local_addr().expect("an address").port();
        let running = place.spawn(&format!(
            "export @/volume --nbd tcp:127.0.0.1:{port} --key file:@/pass \
             --tls-cert @/server.pem --tls-key @/server.key --tls-clients @/clients.pem"
        ));
        let mut served = Self { place, plain, port, running: Some(running) };
        eventually("it listens", || {
            let running = served.running.as_mut().expect("started");
            assert!(running.is_running(), "it has ended: {}", running.said());
            TcpStream::connect(("127.0.0.1", port)).is_ok()
        });
        served
    }

    /// A script with `$uri` of a client with these certificates.
    fn shell(&self, certificates: &str, script: &str) -> tests::Ran {
        let directory = self.place.path(certificates);
        let uri = format!("nbds://127.0.0.1:{}/?tls-certificates={}", self.port, directory.display());
        let mut command = self.place.script(script);
        command.current_dir(self.place.path(""));
        command
            .env("uri", uri)
            .env("plain_uri", format!("nbd://127.0.0.1:{}/", self.port))
            .env("seed", seed().to_string());
        self.place.finish(command)
    }

    fn stop(&mut self) {
        let running = self.running.take().expect("running");
        running.signal(Signal::INT);
        let _ = running.wait();
        let daemon = self.place.daemon.as_mut().expect("a daemon");
        assert!(daemon.is_running(), "the daemon has ended: {}", daemon.log());
    }
}

#[test]
fn a_volume_is_read_and_written_over_tls() {
    if !have(&["nbdcopy", "nbdinfo", "nbdsh"]) {
        return;
    }
    let mut served = Served::new(24 * MIB);
    let _ = served.shell("right", "nbdinfo --list \"$uri\" && nbdinfo --map \"$uri\"").done();
    let _ = served.shell("right", "nbdcopy \"$uri\" copy && cmp copy plain").done();
    let next: Vec<u8> = served.plain.iter().map(|byte| !byte).collect();
    served.place.write("next", &next);
    let _ = served.shell("right", "nbdcopy --connections=4 --requests=32 --flush next \"$uri\"").done();
    let _ = served.shell("right", "nbdcopy --connections=4 \"$uri\" copy && cmp copy next").done();
    // Every length around a record, a buffer and what is sealed at a time; many in flight; simple replies, too.
    let _ = served
        .shell(
            "right",
            r#"cat > script.py <<'END'
import random, os
random.seed(int(os.environ["seed"]))
model = bytearray(open("next", "rb").read())
for structured in (True, False):
    n = nbd.NBD()
    n.set_uri_allow_local_file(True)
    n.set_request_structured_replies(structured)
    n.connect_uri(os.environ["uri"])
    assert n.get_tls_negotiated()
    lengths = [1, 511, 4096, 20 << 20]
    for middle in (16384, 32768, 49152, 65536, 262144):
        lengths += [middle + by for by in (-29, -1, 0, 1, 22, 29)]
    for length in lengths:
        at = random.randrange(0, len(model) - length)
        data = random.randbytes(length)
        n.pwrite(data, at, nbd.CMD_FLAG_FUA if length % 2 else 0)
        model[at:at + length] = data
        assert n.pread(length, at) == data, length
    flights = []
    for _ in range(300):
        length = random.choice([512, 4096, 5000, 70000])
        at = random.randrange(0, len(model) - length)
        buffer = nbd.Buffer(length)
        flights.append((n.aio_pread(buffer, at), buffer, at, length))
    for cookie, buffer, at, length in flights:
        while not n.aio_command_completed(cookie):
            n.poll(-1)
        assert buffer.to_bytearray() == model[at:at + length], (at, length)
    for size in (4096, 1 << 20):
        n.zero(size, 8192)
        model[8192:8192 + size] = bytes(size)
    n.flush()
    n.shutdown()
open("model", "wb").write(model)
END
PATH=/usr/bin:$PATH nbdsh -c - < script.py"#,
        )
        .done();
    served.stop();
    let _ = served.place.run("decrypt @/volume @/after --key file:@/pass").done();
    assert!(served.place.read("after") == served.place.read("model"), "the volume holds what was written");
}

#[test]
fn who_shows_no_certificate_of_ours_gets_nothing() {
    if !have(&["nbdinfo"]) {
        return;
    }
    let mut served = Served::new(MIB);
    for certificates in ["none", "wrong", "strange"] {
        let ran = served.shell(certificates, "nbdinfo \"$uri\"");
        assert_ne!(ran.code, Some(0), "{certificates}: {ran:?}");
        assert!(!ran.text().contains("export-size"), "{certificates}: {ran:?}");
    }
    for script in ["nbdinfo \"$plain_uri\"", "nbdinfo --list \"$plain_uri\""] {
        let ran = served.shell("right", script);
        assert_ne!(ran.code, Some(0), "{script}: {ran:?}");
        assert!(!ran.text().contains("export-size"), "{script}: {ran:?}");
    }
    let _ = served.shell("right", "nbdinfo \"$uri\" | grep export-size").done();
    served.stop();
    let log = served.place.daemon.as_ref().expect("a daemon").log();
    assert!(log.contains("a client of an export was refused"), "{log}");
}

#[test]
fn what_is_no_tls_behind_starttls_is_the_end_of_one_connection() {
    let mut served = Served::new(MIB);
    // Of a handshake's message, longer than anybody holds, all but the end.
    let endless: Vec<u8> = (0..5)
        .flat_map(|nth| {
            let mut record = vec![0x16, 3, 1, 0x3f, 0xff];
            record.resize(5 + 0x3fff, 0);
            if nth == 0 {
                record[5..9].copy_from_slice(&[1, 0, 0xff, 0xff]);
            }
            record
        })
        .collect();
    for (nth, junk) in [
        &b"NBDMAGIC, as before"[..],
        &[0x16, 3, 1, 0xff, 0xff, 1],
        &[0; 70_000],
        &[0x16; 70_000],
        &endless[..60_000],
        &endless,
    ]
    .into_iter()
    .enumerate()
    {
        for together in [true, false] {
            let mut stream = TcpStream::connect(("127.0.0.1", served.port)).expect("connects");
            stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
            stream.read_exact(&mut [0; GREETING_BYTES]).expect("a greeting");
            let mut bytes = vec![0, 0, 0, 3];
            put_option(&mut bytes, number::STARTTLS, b"");
            assert_eq!(bytes.len(), 4 + OPTION_BYTES);
            let mut head = [0; REPLY_BYTES];
            if together {
                bytes.extend_from_slice(junk);
                let _ = stream.write_all(&bytes);
            } else {
                stream.write_all(&bytes).expect("written");
            }
            // What was written behind it may have ended the connection before the answer was read.
            match stream.read_exact(&mut head) {
                Ok(()) => assert_eq!(parse_reply(&head).map(|reply| reply.kind), Some(answer::ACK)),
                Err(_) => assert!(together),
            }
            if !together {
                let _ = stream.write_all(junk);
            }
            // A record that is not whole is waited for; whoever has no more to say leaves.
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let mut rest = Vec::new();
            let _ = stream.read_to_end(&mut rest);
            assert!(
                rest.len() < 100,
                "{nth}: an alert at most, no greeting and no option's reply: {rest:x?}"
            );
        }
    }
    if have(&["nbdinfo"]) {
        let _ = served.shell("right", "nbdinfo \"$uri\"").done();
    }
    served.stop();
}

#[test]
fn certificates_and_keys_that_are_no_use_are_refused_in_words() {
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let (certificate, key) = ours.sign(&["localhost"], ExtendedKeyUsagePurpose::ServerAuth);
    let (_, other_key) = theirs.sign(&["localhost"], ExtendedKeyUsagePurpose::ServerAuth);
    let good = (certificate.as_str(), key.as_str(), ours.pem.as_str());
    server_config(good.0.as_bytes(), good.1.as_bytes(), good.2.as_bytes()).expect("all is well");
    let cut = &certificate[..certificate.len() / 2];
    let forged = certificate.replace("MI", "AA");
    for (certificate, key, clients, says) in [
        ("", good.1, good.2, "no certificate"),
        ("no PEM at all", good.1, good.2, "no certificate"),
        (good.1, good.1, good.2, "no certificate"),
        (cut, good.1, good.2, "cannot be read as PEM"),
        (good.0, "", good.2, "private key cannot be read as PEM"),
        (good.0, good.0, good.2, "private key cannot be read as PEM"),
        (good.0, &other_key, good.2, "not of its private key"),
        (good.0, "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", good.2, "of no use"),
        (good.0, good.1, "", "no certificate"),
        (good.0, good.1, &forged, "is no certificate"),
    ] {
        let error =
            server_config(certificate.as_bytes(), key.as_bytes(), clients.as_bytes()).expect_err(says);
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.chain().contains(says), "{says:?}: {}", error.chain());
    }
}
