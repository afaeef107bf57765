//! Where the cache is, which hub is asked, and who asks: the environment as `huggingface_hub` reads it.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::time::Duration;

use lexico::shown::shown;

/// Values that switch a variable on, whatever their case.
const YES: [&str; 4] = ["1", "on", "yes", "true"];
const ENDPOINT: &str = "https://huggingface.co";
/// Seconds that `huggingface_hub` waits for an answer, and for more of a file.
const SECONDS: u64 = 10;

/// Settings of all requests, and of the cache.
#[derive(Debug, PartialEq)]
pub(super) struct Settings {
    /// Folder of all repositories.
    pub(super) cache: PathBuf,
    /// Address of the hub, with no slash at its end.
    pub(super) endpoint: String,
    /// Token of an account.
    pub(super) token: Option<String>,
    /// The variable that keeps off the network, where one does.
    pub(super) offline: Option<&'static str>,
    /// Time to wait for an answer.
    pub(super) answer: Duration,
    /// Time to wait for more of a file.
    pub(super) more: Duration,
    /// False where no bars are to be drawn.
    pub(super) bars: bool,
    /// False where the cache is to hold files rather than links to them.
    pub(super) links: bool,
}

impl Settings {
    /// Reads the environment; else says what is wrong with which variable.
    pub(super) fn from_environment() -> Result<Self, String> {
        Environment {
            variable: &|name| std::env::var_os(name),
            home: std::env::home_dir(),
        }
        .settings()
    }
}

struct Environment<'a> {
    variable: &'a dyn Fn(&str) -> Option<OsString>,
    home: Option<PathBuf>,
}

impl Environment<'_> {
    fn settings(&self) -> Result<Settings, String> {
        let seconds = |name: &str| match self.text(name)? {
            Some(text) => match text.trim().parse() {
                // As `huggingface_hub` takes it.
                Ok(0) => Ok(Duration::from_secs(SECONDS)),
                Ok(seconds) => Ok(Duration::from_secs(seconds)),
                Err(_) => Err(format!("{name} is no number of seconds: {}", shown(text))),
            },
            None => Ok(Duration::from_secs(SECONDS)),
        };
        let hf_home = self.hf_home();
        // The first that is set says it, a no of the first too.
        let offline = ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"];
        let offline = offline.into_iter().find(|name| self.get(name).is_some());
        let offline = offline.filter(|name| self.is_on(name));
        Ok(Settings {
            cache: match self.first(&["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"]) {
                Some((name, path)) => self.expanded(name, &path)?,
                None => hf_home.clone()?.join("hub"),
            },
            endpoint: self.endpoint()?,
            token: match self.is_on("HF_HUB_DISABLE_IMPLICIT_TOKEN") || offline.is_some() {
                true => None,
                false => self.token(hf_home.ok())?,
            },
            offline,
            answer: seconds("HF_HUB_ETAG_TIMEOUT")?,
            more: seconds("HF_HUB_DOWNLOAD_TIMEOUT")?,
            bars: !self.is_on("HF_HUB_DISABLE_PROGRESS_BARS"),
            links: !self.is_on("HF_HUB_DISABLE_SYMLINKS"),
        })
    }

    /// A variable that is set and not empty.
    fn get(&self, name: &str) -> Option<OsString> {
        (self.variable)(name).filter(|value| !value.is_empty())
    }

    fn first(&self, names: &[&'static str]) -> Option<(&'static str, OsString)> {
        names.iter().find_map(|&name| Some((name, self.get(name)?)))
    }

    fn text(&self, name: &str) -> Result<Option<String>, String> {
        let text = self.get(name).map(OsString::into_string).transpose();
        text.map_err(|_| format!("{name} is not UTF-8 text"))
    }

    fn is_on(&self, name: &str) -> bool {
        let value = self.get(name).unwrap_or_default().to_ascii_lowercase();
        value.to_str().is_some_and(|value| YES.contains(&value))
    }

    fn endpoint(&self) -> Result<String, String> {
        let given = self.text("HF_ENDPOINT")?;
        let endpoint = given.as_deref().map_or("", str::trim);
        let endpoint = endpoint.trim_end_matches('/');
        if endpoint.is_empty() {
            return Ok(ENDPOINT.to_owned());
        }
        let scheme = endpoint.split_once("://").map(|(scheme, _)| scheme);
        if !scheme.is_some_and(|s| ["http", "https"].contains(&&*s.to_ascii_lowercase())) {
            return Err(format!(
                "HF_ENDPOINT is no http:// or https:// address: {}",
                shown(endpoint)
            ));
        }
        Ok(endpoint.to_owned())
    }

    fn hf_home(&self) -> Result<PathBuf, String> {
        if let Some(home) = self.get("HF_HOME") {
            return self.expanded("HF_HOME", &home);
        }
        let cache = match self.get("XDG_CACHE_HOME") {
            Some(cache) => self.expanded("XDG_CACHE_HOME", &cache)?,
            None => self.home("the hub's cache")?.join(".cache"),
        };
        Ok(cache.join("huggingface"))
    }

    fn home(&self, what: &str) -> Result<&Path, String> {
        let home = self.home.as_deref();
        home.filter(|home| !home.as_os_str().is_empty())
            .ok_or_else(|| {
                format!(
                    "there is no home folder for {what}: set HOME, or HF_HOME to a folder to keep downloads in"
                )
            })
    }

    /// A path whose `~` and variables are written out, as Python's `expanduser` and `expandvars` do it.
    fn expanded(&self, name: &str, path: &OsStr) -> Result<PathBuf, String> {
        let Some(text) = path.to_str() else {
            return Ok(path.into());
        };
        let Some(rest) = text.strip_prefix('~') else {
            return Ok(self.with_variables(text).into());
        };
        if !rest.is_empty() && !rest.starts_with('/') && !rest.starts_with('\\') {
            let text = shown(text);
            return Err(format!(
                "{name}={text}: only ~ and ~/ are known, no other user's home; write the path in full"
            ));
        }
        let mut home = self.home(name)?.as_os_str().to_owned();
        home.push(self.with_variables(rest));
        Ok(home.into())
    }

    /// Writes out `$NAME` and `${NAME}`; what is not set stays as it is.
    fn with_variables(&self, text: &str) -> OsString {
        let mut out = OsString::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('$') {
            out.push(before);
            let braced = after
                .strip_prefix('{')
                .and_then(|after| after.split_once('}'));
            let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
            let (name, behind) = braced
                .unwrap_or_else(|| after.split_at(after.find(|c| !word(c)).unwrap_or(after.len())));
            let value =
                (self.variable)(name).filter(|_| !name.is_empty() && !name.contains(['=', '\0']));
            match value {
                Some(value) => {
                    out.push(value);
                    rest = behind;
                }
                None => {
                    out.push("$");
                    rest = after;
                }
            }
        }
        out.push(rest);
        out
    }

    /// The token of the environment, else of the file that `hf auth login` writes.
    fn token(&self, hf_home: Option<PathBuf>) -> Result<Option<String>, String> {
        // Secrets come with line ends.
        let clean = |text: String| {
            let text = text.replace(['\r', '\n'], "").trim().to_owned();
            Some(text).filter(|text| !text.is_empty())
        };
        let of_environment = match self.first(&["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"]) {
            Some((name, _)) => self
                .text(name)?
                .and_then(clean)
                .map(|t| (name.to_owned(), t)),
            None => None,
        };
        let path = match self.get("HF_TOKEN_PATH") {
            Some(path) => Some(self.expanded("HF_TOKEN_PATH", &path)?),
            None => hf_home.map(|home| home.join("token")),
        };
        let of_file = || -> Result<Option<(String, String)>, String> {
            let Some(path) = path else { return Ok(None) };
            let name = lexico::shown::shown_path(&path);
            match std::fs::read_to_string(&path) {
                Ok(text) => Ok(clean(text).map(|token| (name, token))),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(e) => Err(format!("the token in {name} cannot be read: {e}")),
            }
        };
        let token = match of_environment {
            Some(token) => Some(token),
            None => of_file()?,
        };
        match token {
            Some((name, token)) if !token.bytes().all(|b| b.is_ascii_graphic()) => {
                Err(format!("{name} holds characters that no token has"))
            }
            token => Ok(token.map(|(_, token)| token)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn read(home: Option<&str>, variables: &[(&str, &str)]) -> Result<Settings, String> {
        let variables: HashMap<&str, &str> = variables.iter().copied().collect();
        Environment {
            variable: &|name| variables.get(name).map(OsString::from),
            home: home.map(PathBuf::from),
        }
        .settings()
    }

    /// The paths that `huggingface_hub` 2.4 has for the same variables, by its constants.py.
    #[test]
    fn the_cache_is_where_huggingface_hub_has_it() {
        let cases: [(&[(&str, &str)], &str); 12] = [
            (&[], "/home/u/.cache/huggingface/hub"),
            (&[("XDG_CACHE_HOME", "/x")], "/x/huggingface/hub"),
            (&[("HF_HOME", "/h"), ("XDG_CACHE_HOME", "/x")], "/h/hub"),
            (&[("HF_HOME", "~/h")], "/home/u/h/hub"),
            (&[("HF_HOME", "~")], "/home/u/hub"),
            (&[("HF_HOME", "$D/h"), ("D", "/d")], "/d/h/hub"),
            (&[("HF_HOME", "${D}e/$N"), ("D", "/d")], "/de/$N/hub"),
            (&[("HF_HUB_CACHE", "/c"), ("HF_HOME", "/h")], "/c"),
            (&[("HUGGINGFACE_HUB_CACHE", "~/c")], "/home/u/c"),
            (
                &[("HUGGINGFACE_HUB_CACHE", "/old"), ("HF_HUB_CACHE", "/c")],
                "/c",
            ),
            (&[("HF_HOME", "a$"), ("HF_HUB_CACHE", "")], "a$/hub"),
            (&[("HF_HOME", "/a/~b"), ("b", "x")], "/a/~b/hub"),
        ];
        for (variables, path) in cases {
            let settings = read(Some("/home/u"), variables).unwrap();
            assert_eq!(settings.cache, Path::new(path), "{variables:?}");
        }
        // Without a home, only what names a folder in full is known.
        for home in [None, Some("")] {
            let error = read(home, &[]).unwrap_err();
            assert!(error.contains("HF_HOME"), "{error}");
            assert!(read(home, &[("HF_HOME", "~/x")]).is_err());
            let settings = read(home, &[("HF_HUB_CACHE", "/c")]).unwrap();
            assert_eq!(settings.cache, Path::new("/c"));
        }
        let error = read(Some("/home/u"), &[("HF_HOME", "~bob/x")]).unwrap_err();
        assert!(error.contains("~bob"), "{error}");
    }

    #[test]
    fn tokens_are_cleaned() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        let home = folder.path().to_str().unwrap();
        std::fs::write(&file, " hf_file\r\n").unwrap();
        let token = |variables: &[(&str, &str)]| {
            let all = [&[("HF_HOME", home)], variables].concat();
            read(None, &all).map(|settings| settings.token)
        };
        let is = |token: &str| Ok(Some(token.to_owned()));
        assert_eq!(token(&[]), is("hf_file"));
        assert_eq!(token(&[("HF_TOKEN", "hf_x\n")]), is("hf_x"));
        assert_eq!(token(&[("HF_TOKEN", "\t hf_x \r\n")]), is("hf_x"));
        assert_eq!(token(&[("HF_TOKEN", " \n")]), is("hf_file"));
        let old = ("HUGGING_FACE_HUB_TOKEN", "hf_old");
        assert_eq!(token(&[old]), is("hf_old"));
        assert_eq!(token(&[old, ("HF_TOKEN", "hf_x")]), is("hf_x"));
        assert_eq!(token(&[old, ("HF_TOKEN", "")]), is("hf_old"));
        assert_eq!(token(&[("HF_TOKEN_PATH", "/no/such")]), Ok(None));
        let none = ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "yes");
        assert_eq!(token(&[none, ("HF_TOKEN", "hf_x")]), Ok(None));
        let error = token(&[("HF_TOKEN", "hf_secret\u{1b}é")]).unwrap_err();
        assert!(
            error.contains("HF_TOKEN") && !error.contains("secret"),
            "{error}"
        );
    }

    #[test]
    fn switches_addresses_and_times_are_read() {
        let read = |variables: &[(&str, &str)]| read(Some("/h"), variables);
        let offline = |variables: &[(&str, &str)]| read(variables).unwrap().offline;
        assert_eq!(offline(&[("HF_HUB_OFFLINE", "On")]), Some("HF_HUB_OFFLINE"));
        let transformers = ("TRANSFORMERS_OFFLINE", "1");
        assert_eq!(offline(&[transformers]), Some("TRANSFORMERS_OFFLINE"));
        assert_eq!(offline(&[transformers, ("HF_HUB_OFFLINE", "0")]), None);
        assert_eq!(
            offline(&[transformers, ("HF_HUB_OFFLINE", "")]),
            Some("TRANSFORMERS_OFFLINE")
        );
        let endpoint = |given| read(&[("HF_ENDPOINT", given)]).map(|s| s.endpoint);
        assert_eq!(
            endpoint("https://m.com//\n"),
            Ok("https://m.com".to_owned())
        );
        assert_eq!(endpoint(""), Ok(ENDPOINT.to_owned()));
        assert!(endpoint("m.com").unwrap_err().contains("m.com"));
        let times = [
            ("HF_HUB_ETAG_TIMEOUT", "3"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "0"),
        ];
        let settings = read(&times).unwrap();
        assert_eq!(settings.answer, Duration::from_secs(3));
        assert_eq!(settings.more, Duration::from_secs(SECONDS));
        let error = read(&[("HF_HUB_ETAG_TIMEOUT", "soon")]).unwrap_err();
        assert!(error.contains("HF_HUB_ETAG_TIMEOUT"), "{error}");
    }
}
