//! `cryptctl luks …`: one question about a header, or one change of it, and its answer.
//!
//! | file | its one purpose |
//! |---|---|
//! | `mod` | the conversation: ask, wait, give up on a signal, show |
//! | `args` | what was typed |
//! | `new` | a new header's and keyslot's wishes |
//! | `request` | what was typed means: files, secrets, the request |
//! | `token` | tokens as they are typed and shown |
//! | `lock` | cryptsetup's locks |
//! | `render` | answers as people read them |
//! | `help` | the long help |

pub mod args;
pub mod help;
pub mod lock;
pub mod new;
mod render;
mod request;
mod token;

use std::os::fd::AsFd;
use std::path::Path;

use proto::luks::{Dump, Reply, Severity, Summary};
use proto::{Call, ErrorKind};

use crate::args::Global;
use crate::client::{Client, out_of_turn};
use crate::endpoint::End;
use crate::launch;
use crate::passing::PartialFile;
use crate::progress::note;
use crate::prompt;
use crate::render::Output;
use crate::report::{Error, Exit, Result};
use crate::signals::Signals;

use args::{Luks, Token};
use lock::{Lock, Outcome};
use request::{Opened, Prepared, Question};

/// `cryptctl luks …`
pub fn run(verb: &Luks, global: &Global) -> Result<Exit> {
    let mut opened = request::open(verb)?;
    let mut client = launch::reach_or_start(global)?;
    for warning in &opened.warnings {
        note(&format!("warning: {warning}"));
    }
    settle(&mut opened, &mut client)?;
    let lock = lock(&opened)?;
    // From here on there may be something to undo, so a signal must not just end us.
    let signals = Signals::catch()?;
    let result = carry_out(verb, opened, lock.as_ref(), &mut client, signals, global);
    if let Some(lock) = lock
        && is_heard(&result)
    {
        // Else our copy is closed and no more: the daemon's keeps the lock.
        lock.release();
    }
    result
}

/// What has to be known of the volume, or asked of the user, before the request can be made.
fn settle(opened: &mut Opened, client: &mut Client) -> Result<()> {
    if opened.open_question.is_none() {
        return Ok(());
    }
    let (request, descriptors) = opened.preliminary()?;
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let (reply, _) = client.call(Call::Luks(Box::new(request)), &borrowed).map_err(in_our_words)?;
    drop(borrowed);
    drop(descriptors);
    let proto::Reply::Luks(reply) = reply else { return Err(out_of_turn()) };
    let Reply::Dump(dump) = *reply else { return Err(out_of_turn()) };
    if let Some(Question::MayErase(name)) = &opened.open_question {
        confirm_erasing(name, &dump)?;
    }
    opened.settle_keyslot(&dump.summary)
}

/// The header of a volume in short; `None`: it has none. For volumes of servers, which only the daemon looks at.
///
/// # Errors
/// It has one that cannot be read, or the daemon or the server does not answer.
pub fn summary(client: &mut Client, volume: &End) -> Result<Option<Summary>> {
    let (request, descriptors) = request::look(volume, None)?;
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    match client.call(Call::Luks(Box::new(request)), &borrowed) {
        Ok((proto::Reply::Luks(reply), _)) => match *reply {
            Reply::Dump(dump) => Ok(Some(dump.summary)),
            _ => Err(out_of_turn()),
        },
        Ok(_) => Err(out_of_turn()),
        Err(error) if error.failure.message.starts_with("not a LUKS volume") => Ok(None),
        Err(error) => Err(in_our_words(error)),
    }
}

fn confirm_erasing(name: &str, dump: &Dump) -> Result<()> {
    let text = crate::report::printable(&format!(
        "Every keyslot of {name} (UUID {}) will be destroyed. Without a header backup nobody reads its data again.",
        dump.summary.uuid
    ));
    let answer = prompt::question("erase asks first", &format!("{text}\nType YES to go on: "))
        .map_err(|error| error.hint("--yes-destroy-all-keys does it without asking"))?;
    if answer == "YES" {
        Ok(())
    } else {
        Err(Error::new(ErrorKind::Cancelled, format!("{name} was left as it is")))
    }
}

/// cryptsetup's lock, where there is a block device and we may have it.
fn lock(opened: &Opened) -> Result<Option<Lock>> {
    let Some((rdev, name)) = opened.lockable() else { return Ok(None) };
    let of = lock::Of::Header { rdev, name, write: opened.writes };
    match lock::take(Path::new(lock::DIRECTORY), of, lock::PATIENCE, &mut note)? {
        Outcome::Held(lock) => Ok(Some(lock)),
        Outcome::NotPermitted(why) => {
            // A reader sees at worst a header that was being written, which its checksum tells.
            if opened.writes {
                note(&format!("warning: cryptsetup is not kept from changing {name} meanwhile: {why}"));
            }
            Ok(None)
        }
    }
}

fn carry_out(
    verb: &Luks,
    opened: Opened,
    lock: Option<&Lock>,
    client: &mut Client,
    signals: Signals,
    global: &Global,
) -> Result<Exit> {
    let doubt = opened.doubt.clone();
    let Prepared { request, descriptors, partials } = opened.create(lock.map(Lock::as_fd))?;
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let result = ask(client, signals, Call::Luks(Box::new(request)), &borrowed);
    drop(borrowed);
    drop(descriptors);
    match result {
        Ok((reply, text)) => show(verb, &reply, &text, global),
        Err(error) => {
            // The daemon undid what it had; what it could not, we can.
            partials.iter().filter_map(PartialFile::abandon).for_each(|what| note(&what));
            Err(in_our_words(error).doubted(doubt))
        }
    }
}

/// What the daemon advises without knowing our options, and the option that does it.
const ADVICE: [(&str, &str); 4] = [
    ("say that the last one may go", "use --last-key-destroy-data"),
    (
        "say that it may be another's to restore it all the same",
        "--replace-other-header restores it all the same",
    ),
    ("say that it may be replaced", "use --token-replace"),
    // Right for a job; no verb here has a format without a header.
    ("a volume without a header is opened with --format raw and its cipher; ", ""),
];

/// A refusal whose hint names our options.
fn in_our_words(mut error: Error) -> Error {
    if let Some(hint) = &mut error.failure.hint {
        for (said, option) in ADVICE {
            *hint = hint.replace(said, option);
        }
    }
    error
}

/// Ask and wait for the answer, however long a key derivation takes. A signal hangs up, upon which the daemon gives up if
/// nothing is written yet.
fn ask(
    client: &mut Client,
    mut signals: Signals,
    call: Call,
    descriptors: &[std::os::fd::BorrowedFd<'_>],
) -> Result<(Reply, String)> {
    let id = client.send(call, descriptors)?;
    loop {
        if let Some(answer) = client.answer(id)? {
            let (proto::Reply::Luks(reply), text) = answer? else { return Err(out_of_turn()) };
            return Ok((*reply, text));
        }
        let woken = client.wait(Some(signals.as_fd()), None)?;
        if woken.readable {
            client.fill()?;
        } else if woken.other && signals.take() > 0 {
            client.hang_up();
            return Err(Error::new(
                ErrorKind::Cancelled,
                "interrupted: nothing is changed, unless writing had begun; then it is completed",
            )
            .hint("`cryptctl luks dump` shows the header as it is"));
        }
    }
}

/// Did the daemon say how it ended? Otherwise it may still be at it.
fn is_heard<T>(result: &Result<T>) -> bool {
    !matches!(result, Err(error) if error.exit == Exit::Unreachable || error.failure.kind == ErrorKind::Cancelled)
}

/// Show the answer. A summary goes to standard error and is left out with `--quiet`; what was asked for is the output.
fn show(verb: &Luks, reply: &Reply, text: &str, global: &Global) -> Result<Exit> {
    let fits = match reply {
        Reply::Done(_) => {
            !matches!(verb, Luks::Dump(_) | Luks::Token(Token::List(_)) | Luks::Repair(_) | Luks::Doctor(_))
        }
        Reply::Dump(_) => matches!(verb, Luks::Dump(_)),
        Reply::Tokens(_) => matches!(verb, Luks::Token(Token::List(_))),
        Reply::Repaired(_) => matches!(verb, Luks::Repair(_)),
        Reply::Doctor(_) => matches!(verb, Luks::Doctor(_)),
    };
    if !fits {
        return Err(out_of_turn());
    }
    let mut output = Output::new(false);
    let colour = output.colour();
    if global.json {
        output.line(text);
    } else {
        match reply {
            Reply::Done(done) => {
                for warning in &done.warnings {
                    note(&format!("warning: {warning}"));
                }
                if !global.quiet {
                    match verb {
                        Luks::OpenTest(_) => output.text(&render::opened(done)),
                        _ => note(&render::done(verb, done)),
                    }
                }
            }
            Reply::Dump(dump) => output.text(&render::dump(dump, colour)),
            Reply::Tokens(tokens) => output.text(&render::tokens(tokens, colour)),
            Reply::Repaired(repaired) => output.text(&render::repaired(repaired)),
            Reply::Doctor(doctor) => output.text(&render::doctor(doctor, colour)),
        }
    }
    match reply {
        Reply::Doctor(doctor)
            if doctor.findings.iter().any(|finding| finding.severity == Severity::Danger) =>
        {
            Ok(Exit::Failed)
        }
        _ => output.end().map(|()| Exit::Done),
    }
}

#[cfg(test)]
mod tests;
