//! The conversation, against a peer of canned answers.

use super::*;
use clap::Parser;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};

const HELLO: &str = r#"{"v":1,"id":1,"ok":{"hello":{"version":"0","protocol":1,"pid":9,"uid":0}}}"#;

fn reply(id: u64, reply: &str) -> String {
    format!(r#"{{"v":1,"id":{id},"ok":{{"luks":{reply}}}}}"#)
}

/// Run `luks ARGS` (`@` is the directory) against a peer that answers the n-th request with the n-th answer and then waits
/// for the end; with so many signals pending from the start. Also what was asked.
fn against(dir: &Path, args: &str, answers: &[&str], signals: usize) -> (Result<Exit>, Vec<String>) {
    let patience = Some(std::time::Duration::from_secs(60));
    let (mut sender, reader) = UnixStream::pair().expect("pair");
    sender.write_all(&vec![1; signals]).expect("short enough");
    std::fs::write(dir.join("key"), "hunter2").expect("write");
    std::fs::write(dir.join("line"), "hunter2\n").expect("write");
    std::fs::write(dir.join("vol"), [0; 512]).expect("write");
    let _ = std::fs::remove_file(dir.join("s"));
    let listener = UnixListener::bind(dir.join("s")).expect("bind");
    let answers: Vec<String> = answers.iter().map(|&answer| answer.to_owned()).collect();
    let peer = std::thread::spawn(move || {
        let (stream, _) = listener.accept().expect("accept");
        stream.set_read_timeout(patience).expect("a socket");
        let mut lines = BufReader::new(&stream).lines();
        let mut asked = Vec::new();
        for answer in answers {
            match answer.as_str() {
                // The other side must hang up.
                "end" => assert!(lines.next().is_none(), "it goes on asking"),
                answer => {
                    asked.push(lines.next().expect("a request").expect("readable"));
                    (&stream).write_all(answer.as_bytes()).expect("answer");
                    if !answer.is_empty() {
                        (&stream).write_all(b"\n").expect("answer");
                    }
                }
            }
        }
        asked
    });
    let words = args.split_whitespace().map(|word| word.replace('@', dir.to_str().expect("UTF-8")));
    let words = ["cryptctl".to_owned(), "luks".into()].into_iter().chain(words);
    let cli = crate::args::Cli::try_parse_from(words).unwrap_or_else(|error| panic!("{error}"));
    let crate::args::Verb::Luks(verb) = &cli.verb else { panic!("a luks verb was typed") };
    let mut client = Client::connect(&dir.join("s")).expect("hello").expect("listens");
    let result = (|| {
        let mut opened = request::open(verb)?;
        settle(&mut opened, &mut client)?;
        carry_out(verb, opened, None, &mut client, Signals::from_bytes(reader), &cli.global)
    })();
    drop(client);
    (result, peer.join().expect("peer"))
}

#[test]
fn a_change_that_is_done_ends_with_nought() {
    let dir = tempfile::tempdir().expect("dir");
    let done = reply(2, r#"{"done":{"keyslot":1,"uuid":"u"}}"#);
    let (result, asked) =
        against(dir.path(), "add-key @/vol --key file:@/key --new-key file:@/key -q", &[HELLO, &done], 0);
    assert_eq!(result, Ok(Exit::Done));
    assert!(asked[1].contains(r#""add_key":{"#), "{asked:?}");
    assert!(!asked.concat().contains("hunter2"), "no secret is in the JSON: {asked:?}");
}

#[test]
fn a_danger_found_ends_with_one_and_less_does_not() {
    let dir = tempfile::tempdir().expect("dir");
    for (severity, exit) in [("note", Exit::Done), ("weak", Exit::Done), ("danger", Exit::Failed)] {
        let doctor = reply(
            2,
            &format!(
                r#"{{"doctor":{{"summary":{{"version":"luks2","uuid":"u","segments":[],"keyslots":[]}},"findings":[{{"severity":"{severity}","about":"header","message":"m"}}],"tools":[]}}}}"#
            ),
        );
        for flag in ["", " --json"] {
            let (result, _) = against(dir.path(), &format!("doctor @/vol{flag}"), &[HELLO, &doctor], 0);
            assert_eq!(result, Ok(exit), "{severity}");
        }
    }
}

#[test]
fn a_wrong_key_ends_with_four_and_the_newline_explains_it() {
    let dir = tempfile::tempdir().expect("dir");
    let refusal = r#"{"v":1,"id":2,"error":{"kind":"wrong_key","message":"wrong key or damaged data"}}"#;
    for (key, hinted) in [("key", false), ("line", true)] {
        let (result, _) =
            against(dir.path(), &format!("open-test @/vol --key file:@/{key}"), &[HELLO, refusal], 0);
        let error = result.expect_err("wrong");
        assert_eq!(error.exit, Exit::WrongKey);
        assert_eq!(error.failure.hint.is_some_and(|hint| hint.contains("newline")), hinted);
    }
}

#[test]
fn a_refusal_names_the_option_that_allows_it() {
    let dir = tempfile::tempdir().expect("dir");
    let volume = "a volume without a header is opened with --format raw and its cipher; a detached header is named with --header";
    for (args, said, shown) in [
        (
            "remove-key @/vol --key-slot 0",
            "add another passphrase first, or say that the last one may go",
            "add another passphrase first, or use --last-key-destroy-data",
        ),
        (
            "header-restore @/vol @/key",
            "only if it belongs to it; say that it may be another's to restore it all the same",
            "only if it belongs to it; --replace-other-header restores it all the same",
        ),
        (
            "token add @/vol --key-ref file:/k --key-slot 0 --token-id 1",
            "say that it may be replaced, or leave the number out",
            "use --token-replace, or leave the number out",
        ),
        ("dump @/vol", volume, "a detached header is named with --header"),
    ] {
        let refusal =
            format!(r#"{{"v":1,"id":2,"error":{{"kind":"conflict","message":"m","hint":"{said}"}}}}"#);
        let error = against(dir.path(), args, &[HELLO, &refusal], 0).0.expect_err("refused");
        assert_eq!(error.failure.hint.as_deref(), Some(shown), "{args}");
    }
}

#[test]
fn an_answer_to_another_question_is_not_shown_as_if_it_fitted() {
    let dir = tempfile::tempdir().expect("dir");
    let tokens = reply(2, r#"{"tokens":{}}"#);
    let (result, _) = against(dir.path(), "dump @/vol", &[HELLO, &tokens], 0);
    assert_eq!(result.expect_err("out of turn").exit, Exit::Unreachable);
    let (result, _) = against(dir.path(), "token list @/vol", &[HELLO, &tokens], 0);
    assert_eq!(result, Ok(Exit::Done));
}

#[test]
fn a_signal_hangs_up_at_once_and_leaves_no_half_file() {
    let dir = tempfile::tempdir().expect("dir");
    for args in ["convert-kdf @/vol --key file:@/key -q", "header-backup @/vol @/backup"] {
        let error = against(dir.path(), args, &[HELLO, "", "end"], 1).0.expect_err("interrupted");
        assert_eq!((error.exit, error.failure.kind), (Exit::Failed, ErrorKind::Cancelled), "{error}");
        assert!(!is_heard::<()>(&Err(error)), "the daemon may still be at it, and keeps the lock");
        assert!(!dir.path().join("backup.partial").exists());
    }
}

#[test]
fn a_backup_that_fails_leaves_no_half_file() {
    let dir = tempfile::tempdir().expect("dir");
    let refusal = r#"{"v":1,"id":2,"error":{"kind":"io","message":"read failed"}}"#;
    for (answers, exit) in [(&[HELLO, refusal][..], Exit::Failed), (&[HELLO, ""], Exit::Unreachable)] {
        let (result, _) = against(dir.path(), "header-backup @/vol @/backup", answers, 0);
        assert_eq!(result.expect_err("failed").exit, exit);
        assert!(!dir.path().join("backup.partial").exists() && !dir.path().join("backup").exists());
    }
}

#[test]
fn our_token_asks_for_the_only_keyslot_first() {
    let dir = tempfile::tempdir().expect("dir");
    let dump = reply(
        2,
        r#"{"dump":{"summary":{"version":"luks2","uuid":"u","segments":[],"keyslots":[{"id":6,"kind":"luks2","bound":true}]},"metadata":{}}}"#,
    );
    let done = reply(3, r#"{"done":{"token":0,"uuid":"u"}}"#);
    let (result, asked) =
        against(dir.path(), "token add @/vol --key-ref file:/k -q", &[HELLO, &dump, &done], 0);
    assert_eq!(result, Ok(Exit::Done));
    assert!(asked[1].contains(r#"{"dump":{}}"#), "{asked:?}");
    assert!(asked[2].contains(r#""keyslots":["6"]"#), "{asked:?}");
}
